"""Every malformed input ends in one line that names what is wrong and the remedy, and leaves the folder as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import (
    adapters,
    advice,
    configs,
    data,
    exports,
    folders,
    launchers,
    models,
    predictions,
    queries,
    selectors,
)
from tests.bad_input.place import Case, Place, assert_refused, listing
from tests.distributed.launch import ROOT, run_launched
from tests.runs import go
from tsqlora_scale.commands import main as cli

CASES: dict[str, Case] = {
    f"{module.__name__.rsplit('.', 1)[-1]}: {case.name}": case
    for module in (
        configs,
        data,
        models,
        folders,
        launchers,
        predictions,
        queries,
        selectors,
        advice,
        exports,
        adapters,
    )
    for case in module.CASES
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """The run folder of a run that every place's config describes, done."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        go(Place(folder, models_dir, folder).tree)
    return folder / "runs" / "run"


@pytest.fixture
def place(tmp_path: Path, models_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, models_dir, finished)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(
    case: Case, place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make(place)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    arguments = place.command_line(case.command)
    before = listing(place.folder)
    capfd.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as leaving:  # of argparse
        code = int(str(leaving.code))
    printed = capfd.readouterr()
    assert_refused(code, printed.out, printed.err, case.words)
    assert listing(place.folder) == before


def test_what_is_damaged_is_right_otherwise(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Or the cases would be refused for another reason than their own."""
    assert cli.main([*place.command_line("train"), "--dry-run"]) == 0
    place.own_adapter()
    assert cli.main(place.command_line("evaluate")) == 0
    assert "accuracy: " in capfd.readouterr().out


MIXED = '{"text": 5, "label": 1}\r\n{"text": true, "label": "no"}\r\n{"text": "a", "label": 0.0}'
SMALL_OR_ODD = {
    "one sample": '{"text": "a film", "label": "yes"}',
    "fewer samples than a batch": '{"text": "a film", "label": "yes"}\n{"text": "no film", "label": "no"}\n' * 2,
    "cells of several types": MIXED,
    "a line of 10 MB": '\ufeff{"text": "a film", "label": "yes", "notes": "' + "film " * 2 * 10**6 + '"}',
}


@pytest.mark.parametrize("content", SMALL_OR_ODD.values(), ids=SMALL_OR_ODD)
def test_what_looks_wrong_and_is_not(content: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.train_file("x.jsonl", content)
    assert cli.main([*place.command_line("train"), "train.max_steps=5"]) == 0, capfd.readouterr().err
    assert (place.run_dir / "adapter").is_dir()


#: As a user starts them: a process of its own, whose libraries have not been imported before.
IN_A_PROCESS = [
    "configs: a bomb of anchors",
    pytest.param("data: text that is not UTF-8", marks=pytest.mark.slow),
    pytest.param("models: adapter: of another size", marks=pytest.mark.slow),
    pytest.param("folders: resume: another text", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_bad_input_in_a_process_of_its_own(name: str, place: Place) -> None:
    case = CASES[name]
    case.make(place)
    command, *arguments = place.command_line(case.command)
    before = listing(place.folder)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{command}.py"), *arguments],
        capture_output=True, text=True, cwd=place.folder, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert_refused(done.returncode, done.stdout, done.stderr, case.words)
    assert listing(place.folder) == before


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["data: an unknown label", "models: more layers than weights", "launchers: DeepSpeed: bf16"]
)
def test_bad_input_on_two_ranks(
    name: str, place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the process group exists, and after it."""
    case = CASES[name]
    case.make(place)
    for variable, value in case.environment.items():
        monkeypatch.setenv(variable, value.replace("ds.json", str(place.folder / "ds.json")))
    place.tree["task"]["dataset"]["path"] = str(place.data)
    command, *arguments = place.command_line(case.command)
    before = listing(place.folder)
    folder = tmp_path_factory.mktemp("launch")
    done = run_launched("ddp-2", ROOT / "launch" / f"{command}.py", arguments, folder, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stdout
    assert all(word in lines[0] for word in case.words), lines[0]
    assert "tsqlora_scale/" not in done.stdout, "a traceback of ours"
    assert "exitcode  : 2" in done.stdout
    assert listing(place.folder) == before
