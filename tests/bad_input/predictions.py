"""Requests for answers that cannot be met."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.place import Case, Place

NEW = '{"text": "a film"}\n'


def request(
    name: str, damage: Callable[[Place], Any], *words: str, data: str = "new.jsonl", out: str = "o.csv"
) -> Case:
    """A request that is right but for what ``damage`` does."""

    def make(place: Place) -> None:
        (place.folder / "new.jsonl").write_text(NEW)
        place.own_adapter()
        place.arguments += ["--data", str(place.folder / data), "--out", str(place.folder / out)]
        damage(place)

    return Case(name, words, make, "predict")


def rows(file: str, content: str | bytes) -> Callable[[Place], Any]:
    """Another content of a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda place: (place.folder / file).write_bytes(data)


def _twice() -> bytes:
    """A parquet file with a column that is there twice, as joins make them."""
    table = pa.Table.from_arrays([pa.array([text]) for text in ("a", "b", "c")], names=["text", "x", "x"])
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def nothing(_: Place) -> None:
    """What is wrong is said by the arguments."""


def of_run(place: Place, run: Path) -> None:
    """The adapter of a run folder in the place of the one that is named, and its config."""
    at = place.arguments.index("--adapter")
    place.arguments[at : at + 2] = ["--run", str(run)]


CASES = [
    request("no data", nothing, "--data", "nowhere.csv", "no such file", data="nowhere.csv"),
    request("data is a folder", nothing, "--data", "is no file", data="adapter"),
    request("data of an unknown format", rows("x.xlsx", "x"), "x.xlsx", "unknown format", data="x.xlsx"),
    request("no column of text", rows("new.jsonl", '{"txt": "a"}'), "task.text[0]='text'", "did you mean 'txt'"),
    request("not UTF-8", rows("x.csv", b"text\na film\nna\xefve\n"), "x.csv, line 3", "UTF-8", data="x.csv"),
    request("no rows", rows("x.csv", "text\n"), "x.csv", "no rows", data="x.csv"),
    request("a row of other length", rows("x.csv", "text,id\na,b\nc\n"), "x.csv, row 2", "1 fields", data="x.csv"),
    request("an unknown format to write", nothing, "--out", "o.xlsx", ".csv, .tsv, .jsonl or .parquet", out="o.xlsx"),
    request("a zipped file to write", nothing, "--out", "unknown format", out="o.csv.gz"),
    request("no folder to write to", nothing, "--out", "no folder", out="no/o.csv"),
    request("a folder to write to", lambda place: (place.folder / "o.csv").mkdir(), "--out", "is a folder"),
    request("what is there", rows("o.csv", "mine"), "--out", "is there already", "--overwrite"),
    request("the data itself", nothing, "--out", "--data itself", out="new.jsonl"),
    request("an answer's name", rows("new.jsonl", '{"text": "a", "prediction": 1}'), "'prediction'", "rename it"),
    request("a column twice", rows("x.parquet", _twice()), "the column 'x' is there twice", "rename", data="x.parquet"),
    request("half a surrogate pair", rows("new.jsonl", '{"text": "a", "note": "\\ud83d"}'), "row 1", "surrogate"),
    request("no such run", lambda place: of_run(place, place.folder / "no"), "--run", "no folder"),
    request("a run without an adapter", lambda place: of_run(place, place.data), "--run", "holds no adapter/"),
    request("an adapter that is none", lambda place: (place.folder / "adapter" / "adapter_config.json").unlink(),
            "holds no adapter_config.json"),
    Case("neither a run nor an adapter", ("--run or --adapter",),
         lambda place: place.arguments.extend(["--data", "new.jsonl", "--out", "o.csv"]), "predict"),
    Case("no file to write", ("--out", "--help"), lambda place: place.arguments.extend(["--data", "x"]), "predict"),
]  # fmt: skip
