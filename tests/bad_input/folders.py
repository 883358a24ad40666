"""Run folders, checkpoints and outputs that are in the way, belong to another run, or cannot be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.models import cut
from tests.bad_input.place import Case, Place, settings


def _holding(name: str) -> Callable[[Place], None]:
    """A run folder that holds one of a run's results."""

    def make(place: Place) -> None:
        place.run_dir.mkdir(parents=True)
        (place.run_dir / name).write_text("weeks of work")

    return make


def _file_as_output(below: str = "") -> Callable[[Place], None]:
    def make(place: Place) -> None:
        (place.folder / "taken").write_text("mine")
        place.set(run={"output_dir": str(place.folder / "taken") + below})

    return make


def _linked(place: Place) -> None:
    (place.folder / "served").symlink_to(place.folder / "nothing")
    _out("--format", "peft", "--out", str(place.folder / "served"))(place)


def _own_list(*options: str) -> Callable[[Place], None]:
    """The list of an audit in the run's own folder."""

    def make(place: Place) -> None:
        audit = place.run_dir / "audit"
        audit.mkdir(parents=True)
        (audit / "fixes.csv").write_text("sample_id\n1\n")
        place.tree["task"]["dataset"]["exclude"] = str(audit / "fixes.csv")
        place.arguments += options

    return make


def _own_rows(key: str) -> Callable[[Place], None]:
    """Rows of an audit in the run's own folder."""

    def make(place: Place) -> None:
        audit = place.run_dir / "audit"
        audit.mkdir(parents=True)
        shutil.copy(place.data / "train.jsonl", audit / "rows.jsonl")
        section = place.tree["task"] if key == "query" else place.tree["task"]["dataset"]
        section[key] = str(audit / "rows.jsonl")
        place.arguments.append("--overwrite")

    return make


def resumed(name: str, damage: Callable[[Place], Any], *words: str) -> Case:
    """A finished run, something changed, and ``--resume auto``."""

    def make(place: Place) -> None:
        shutil.copytree(place.finished, place.run_dir)
        place.arguments += ["--resume", "auto"]
        damage(place)

    return Case(name, words, make)


def _other_text(place: Place) -> None:
    path = place.data / "train.jsonl"
    path.write_text(path.read_text().replace("film", "movie"))


def _other_pool(place: Place) -> None:
    path = place.data / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _other_ids(place: Place) -> None:
    path = place.data / "train.jsonl"
    rows = [json.loads(line) | {"id": f"s{i}"} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place.tree["task"]["dataset"]["id_column"] = "id"


def _every_checkpoint(damage: Callable[[Path], Any]) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        for folder in (place.run_dir / "checkpoints").iterdir():
            damage(folder)

    return make


def _out(*arguments: str, make: Callable[[Place], Any] = lambda _: None) -> Callable[[Place], None]:
    """An export; ``{}`` stands for the folder of the case."""

    def prepare(place: Place) -> None:
        place.own_adapter()
        make(place)
        place.arguments += [argument.format(place.folder) for argument in arguments]

    return prepare


IN_THE_WAY = [
    *(
        Case(f"a run folder with {name}", ("already holds a run", "--overwrite"), _holding(name))
        for name in ("config.yaml", "result.json", "adapter", "checkpoints", "metrics.jsonl")
    ),
    Case(
        "overwriting a list that is read",
        ("task.dataset.exclude=", "which a run that starts there empties", "run.name"),
        _own_list("--overwrite"),
    ),
    Case(
        "starting anew over a list that is read",
        ("task.dataset.exclude=", "which a run that starts there empties"),
        _own_list("--resume", "auto"),
    ),
    *(
        Case(f"overwriting what is read: {key}", (f"{key}=", "which a run that starts there empties"), _own_rows(key))
        for key in ("train_file", "dev_file", "query")
    ),
    Case("score: a run folder", ("already holds a run", "--overwrite"), _holding("config.yaml"), "score"),
    Case("a file in the place of the output folder", ("run.output_dir=", "cannot be written"), _file_as_output()),
    Case("a file above the output folder", ("run.output_dir=", "cannot be written"), _file_as_output("/below/it")),
    settings(
        "a disk that takes no files",
        "run.output_dir='/proc/runs'",
        "cannot be written",
        run={"output_dir": "/proc/runs"},
    ),
]

RESUMED = [
    Case(
        "no such checkpoint",
        ("--resume 'nowhere'", "no checkpoint folder"),
        lambda p: p.arguments.extend(["--resume", "nowhere"]),
    ),
    resumed("resume: another text", _other_text, "other training data", "task.dataset"),
    resumed("resume: one sample fewer", _other_pool, "other training data", "task.dataset"),
    resumed("resume: other ids", _other_ids, "task.dataset"),
    resumed("resume: another learning rate", lambda p: p.set(train={"lr": 0.5}), "train.lr=0.01", "0.5", "same config"),
    resumed(
        "resume: shorter than it is",
        lambda p: p.set(train={"max_steps": 8}),
        "step-00000009",
        "train.max_steps",
        "makes 8",
        "give 9 or more",
    ),
    resumed("resume: another model", lambda p: p.own_model(), "model.name_or_path", "same config"),
    resumed(
        "resume: checkpoints cut short",
        _every_checkpoint(lambda f: cut(f / "parameters.safetensors")),
        "no checkpoint",
        "undamaged",
    ),
    resumed(
        "resume: checkpoints without a manifest",
        _every_checkpoint(lambda f: (f / "manifest.json").write_text("[]")),
        "no checkpoint",
        "undamaged",
    ),
]

EXPORTS = [
    Case(
        "out: there already",
        ("--out", "exists", "--overwrite"),
        _out("--format", "peft", "--out", "{}/data-classification"),
        "export",
    ),
    Case(
        "out: the adapter",
        ("--out", "the adapter itself"),
        _out("--format", "peft", "--out", "{}/adapter", "--overwrite"),
        "export",
    ),
    Case(
        "out: a file",
        ("--out", "is a file or a link", "name a folder"),
        _out("--format", "peft", "--out", "{0}/adapter/adapter_config.json", "--overwrite"),
        "export",
    ),
    Case(
        "out: a link to nothing",
        ("--out", "is a file or a link"),
        _linked,
        "export",
    ),
    Case(
        "out: below a file",
        ("--out", "cannot be written"),
        _out("--format", "peft", "--out", "{0}/adapter/adapter_config.json/x"),
        "export",
    ),
    Case(
        "out: a disk that takes no files",
        ("--out", "cannot be written"),
        _out("--format", "peft", "--out", "/proc/x"),
        "export",
    ),
]

OPTIONS = [
    Case("a list of no samples", ("--top 0", "1 or more"), lambda p: p.arguments.extend(["--top", "0"]), "score"),
    Case(
        "a cosine above 1",
        ("--similarity 2", "at most 1"),
        lambda p: p.arguments.extend(["--similarity", "2"]),
        "score",
    ),
    Case(
        "a cosine that is no number",
        ("--similarity nan",),
        lambda p: p.arguments.extend(["--similarity", "nan"]),
        "score",
    ),
    Case("an unknown option", ("--nosuch", "--help"), lambda p: p.arguments.append("--nosuch")),
    Case(
        "an option of the wrong type",
        ("--top", "'many'", "--help"),
        lambda p: p.arguments.extend(["--top", "many"]),
        "score",
    ),
    Case("evaluation of nothing", ("--adapter", "--help"), lambda p: None, "evaluate"),
    Case(
        "evaluation of a run that is none",
        ("--adapter 'nowhere'", "no folder"),
        lambda p: p.arguments.extend(["--run", "nowhere"]),
        "evaluate",
    ),
    Case(
        "evaluation of two things",
        ("--run", "--adapter", "--help"),
        lambda p: p.arguments.extend(["--run", "a", "--adapter", "b"]),
        "evaluate",
    ),
    settings("a start from nowhere", "adapter.init_from='nowhere'", "no folder", adapter={"init_from": "nowhere"}),
    settings("a start from no adapter", "adapter.init_from='.'", "adapter_config.json", adapter={"init_from": "."}),
    settings("the best of nothing", "train.keep", "set 'train.eval_every'", train={"keep": "best"}),
    settings("patience for nothing", "train.patience", "set 'train.eval_every'", train={"patience": 2}),
    Case("an unknown form", ("--format", "'zip'", "--help"), _out("--format", "zip", "--out", "{}/out"), "export"),
]

CASES = [*IN_THE_WAY, *RESUMED, *EXPORTS, *OPTIONS]
