"""Every malformed input ends in one line that names what is wrong and the remedy, and leaves the folder as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import configs, data, models
from tests.bad_input.place import Case, Place, assert_refused, listing
from tests.runs import go, run_tree
from tsqlora_scale import cli

CASES = {
    f"{module.__name__.rsplit('.', 1)[-1]}: {case.name}": case
    for module in (configs, data, models)
    for case in module.CASES
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """An adapter of the places' config."""
    folder = tmp_path_factory.mktemp("trained")
    train = {"max_steps": 1}
    go(run_tree("bert", folder, models_dir, "run", adapter={"method": "lora"}, train=train))
    return folder / "runs" / "run" / "adapter"


@pytest.fixture
def place(tmp_path: Path, models_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, models_dir, trained)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    case.make(place)
    arguments = place.command_line(case.command)
    before = listing(place.folder)
    capfd.readouterr()
    code = cli.main(arguments)
    printed = capfd.readouterr()
    assert_refused(code, printed.out, printed.err, case.words)
    assert listing(place.folder) == before
