"""Whatever is in a config file or on the command line: a config that is written and read back, or one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.unit.config_trees import tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
    return found


KEYS = keys(Config)
NUMBERS = st.sampled_from([True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0])
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["auto", "none", "${run.name}", "${x", "\\${", "1e3", "on", "\0", "\x1b[1m"]
)
LEAVES = st.none() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS | NUMBERS, v, max_size=2), max_leaves=5
)
VALUE_TEXTS = st.text("[]{}:,-?!&*#|>'\"%@`$ \n\tab10.=~<", max_size=12) | st.text(max_size=6)
OVERRIDES = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS) | st.text("abr.=[]-0", max_size=6), VALUE_TEXTS) | VALUE_TEXTS,
    max_size=3,
)
PIECES = st.sampled_from(
    ["&a", "*a", "<<: ", "- ", ": ", "{", "}", "[", "]", "\n", "  ", "!!str ", "? ", "${", "'", *KEYS[:4]]
)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(config.get(parent), dict):
            config[parent] = {}
        config = config[parent]
    config[last] = value


def check(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), overrides=OVERRIDES)
def test_any_values_of_known_keys(tmp_path: Path, changes: dict[str, Any], overrides: list[str]) -> None:
    config = copy.deepcopy(tree())
    for key, value in changes.items():
        put(config, key, value)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    check(path, overrides)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.lists(PIECES, max_size=20).map(lambda pieces: "".join(pieces).encode()))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:  # nothing so short is a config
        load_config(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)
