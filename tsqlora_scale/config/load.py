"""From a YAML file and ``section.key=value`` to a checked config; what is wrong, in one line that names the key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.presets import taken_out
from tsqlora_scale.config.schema import Config
from tsqlora_scale.config.yaml_tree import check_strings, read_tree


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check everything.

    Raises:
        UserError: naming the file or key, the value, and the remedy.
    """
    tree = read_tree(
        Path(path),
        overrides or [],
        sections=list(Config.model_fields),
        resets=taken_out,
    )
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Check a nested mapping.

    Raises:
        UserError: all problems in one line, each with its dotted key.
    """
    check_strings(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        texts = {_key(e) for e in errors if e["type"] == "string_type"}
        # of a key that takes a list or a number, say nothing of the number where the list has been meant
        meant = [e for e in errors if e["type"] != "int_type" or not isinstance(e["input"], list)] or errors
        messages = dict.fromkeys(_describe(e) for e in (meant if texts else errors))
        raise UserError(f"{where}: {'; '.join(messages)}") from None


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys


def _describe(error: Any) -> str:
    known = _known_keys(Config)
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return _unknown(loc, known)
    key = _key(error)
    if error["type"] == "missing":
        return f"missing key {key!r}; set it in the file or on the command line"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    quote = _quote(error["input"]) if error["type"] in ("string_type", "list_type") else ""
    return f"{key}={shown(error['input'])}: {message[0].lower()}{message[1:]}{quote}"


def _key(error: Any) -> str:
    """The key that an error is about.

    pydantic puts the tried member of a union into the location; of that, our key and the places in a list stay.
    """
    known = _known_keys(Config)
    loc = [str(part) for part in error["loc"]]
    named = [".".join(part for part in loc[:n] if not part.isdigit()) for n in range(1, len(loc) + 1)]
    end = max((n for n, name in enumerate(named, 1) if name in known), default=len(loc))
    return ".".join(loc[:end] + [part for part in loc[end:] if part.isdigit()])


def _quote(value: Any) -> str:
    """The remedy where YAML has made something else of a text."""
    if isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        return f"; YAML reads {words} without quotes as a truth value; quote it: '{'yes' if value else 'no'}'"
    if value is None:
        return "; YAML reads null, ~ and nothing at all as no value; quote it: 'null'"
    if isinstance(value, int | float):
        return f"; YAML reads a number where there are no quotes; quote it: '{value}'"
    return "; YAML reads a date where there are no quotes; quote it" if hasattr(value, "isoformat") else ""


def _unknown(loc: list[str], known: list[str]) -> str:
    """The nearest known key: a slip of the pen in this section, then the same name in another, then anything near."""
    key, name, parent = shown(".".join(loc)), loc[-1][:100], loc[:-1]
    parent = [part for part in parent if not part.isdigit()]  # of a list of sections
    siblings = {k.split(".")[-1]: k for k in known if k.split(".")[:-1] == parent}
    elsewhere = {k.split(".")[-1]: k for k in reversed(known)}
    for names, cutoff in ((siblings, 0.75), (elsewhere, 1.0), (siblings, 0.6), (elsewhere, 0.75)):
        near = difflib.get_close_matches(name, names, 1, cutoff)
        if near:
            return f"unknown key {key}; did you mean {names[near[0]]!r}?"
    return f"unknown key {key}; known here: {', '.join(siblings)}"
