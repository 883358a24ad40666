"""Rows of the wanted task that are wrong, and configs that ask for what a query cannot give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.bad_input.place import Case, Place, settings

WORDS = ["the", "a", "is", "was", "not", "very", "good", "and", "but", "with"]
ROWS = [{"text": f"a lovely film {word}", "label": "yes"} for word in WORDS]


def queried(name: str, rows: list[Any], *words: str, damage: Callable[[Place], Any] = lambda place: None) -> Case:
    """A query of these rows, and a held-out set beside it."""

    def make(place: Place) -> None:
        path = place.data / "query.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        place.tree["task"]["query"] = "query.jsonl"
        place.set(sampling={"selector": "query"})
        damage(place)

    return Case(name, words, make)


def _held_out(place: Place) -> None:
    (place.data / "dev.jsonl").write_text('{"text": "A  lovely FILM was", "label": "no"}\n', encoding="utf-8")


def _named(place: Place) -> None:
    path = place.data / "train.jsonl"
    rows = [json.loads(line) | {"id": f"query-{i}"} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place.tree["task"]["dataset"]["id_column"] = "id"


def _epochs(place: Place) -> None:
    place.tree["train"] = {**place.tree["train"], "max_steps": None, "epochs": 2}
    place.tree["sampling"] = {"selector": "query"}


CASES = [
    queried("too few rows", ROWS[:9], "task.query", "query.jsonl", "9 rows", "10 to 500"),
    queried("too many rows", ROWS * 51, "task.query", "510 rows", "10 to 500", "train on the others"),
    queried("no rows", [], "query.jsonl", "empty"),
    queried("no labels", [{"text": "a film"}] * 10, "query.jsonl", "task.label='label'", "no such column"),
    queried("another label", [*ROWS, {"text": "a", "label": "perhaps"}], "query.jsonl, row 11", "'perhaps'"),
    queried("an empty text", [*ROWS, {"text": " ", "label": "no"}], "query.jsonl, row 11", "empty"),
    queried("a row of the held-out set", ROWS, "task.query", "sample 3", "held-out set", damage=_held_out),
    queried("a name of the pool", ROWS, "task.query", "'query-0'", "rename", damage=_named),
    queried("epochs of a set of unknown size", ROWS, "train.epochs", "train.max_steps", damage=_epochs),
    settings("no query to choose by", "sampling.selector: query", "task.query", sampling={"selector": "query"}),
    settings("no such query", "task.query='querry.jsonl'", "no such file", task={"query": "querry.jsonl"}),
    settings("an empty name", "task", "'query' names no file", task={"query": ""}),
    settings("a list with an empty name", "task", "'query' names no file", task={"query": ["query.jsonl", ""]}),
]  # fmt: skip
