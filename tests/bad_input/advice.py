"""Requests for advice that cannot be given."""

from __future__ import annotations

from typing import Any

from tests.bad_input.place import Case, Place


def asked(name: str, arguments: list[str], *words: str, **sections: dict[str, Any]) -> Case:
    """A request for advice with these arguments and keys."""

    def make(place: Place) -> None:
        place.set(**sections)
        place.arguments += arguments

    return Case(name, words, make, command="advise")


def _small(place: Place) -> None:
    place.train_file("few.jsonl", '{"text": "a film", "label": "yes"}\n' * 19)


def _taken(place: Place) -> None:
    place.run_dir.mkdir(parents=True)
    (place.run_dir / "advice").write_text("mine", encoding="utf-8")


CASES = [
    asked("too few rows to look at", ["--rows", "19"], "--rows 19", "20 or more"),
    asked("no steps", ["--pilot", "adapters", "--steps", "0"], "--steps 0", "1 or more"),
    asked("steps of heads", ["--steps", "5"], "--steps 5", "--pilot adapters"),
    asked("no such pilot", ["--pilot", "trees"], "--pilot", "'trees'", "heads"),
    asked("adapters without a query", ["--pilot", "adapters"], "--pilot adapters", "task.query", "leave it out"),
    asked("a query that is not there", [], "task.query='querry.jsonl'", "no such file", task={"query": "querry.jsonl"}),
    asked("an adapter to start from", [], "adapter.init_from='there'", "null", adapter={"init_from": "there"}),
    asked("no such model", [], "model.name_or_path", "nowhere", model={"name_or_path": "nowhere/model"}),
    Case("a small pool", ("19 rows", "20 or more"), _small, command="advise"),
    Case("a file in the way", ("advice", "no folder", "run.name"), _taken, command="advise"),
]  # fmt: skip
