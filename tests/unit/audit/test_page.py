"""The page, the list of fixes and the table, whatever the texts hold."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tsqlora_scale.audit.audit_files import write_audit
from tsqlora_scale.audit.findings import Findings
from tsqlora_scale.audit.page import page_parts
from tsqlora_scale.audit.page_assets import SCRIPT
from tsqlora_scale.audit.share_belief import ShareBelief

NASTY = [
    "</script><script>alert(1)</script>",
    "\u202eright to left\u202c and \x1b[31mred\x00",
    "he said \"no\", <b onclick='x'>&amp; left",
    "日本語 😀 \u0000 عربى",
    "a line\nand another, with comma",
    "=HYPERLINK(1)",
]


class Pool:
    """Enough of a task."""

    def __init__(self, texts: list[str], labels: list[str]) -> None:
        self.texts, self.labels = texts, labels

    def preview(self, row: int) -> str:
        return " ".join(self.texts[row].split())

    def answer(self, row: int) -> str:
        return self.labels[row]

    def digest(self) -> str:
        return "digest"

    def row_weights(self) -> np.ndarray:
        return np.arange(1.0, len(self.texts) + 1)

    def given(self, block: slice) -> pa.Table:
        return pa.table({"text": self.texts[block], "label": self.labels[block]})


def findings(size: int, classes: list[str], **changes: Any) -> Findings:
    generator = np.random.default_rng(0)
    labels, wrong = generator.integers(0, len(classes), size), generator.random(size)
    values: dict[str, Any] = {
        "kind": "classification",
        "ids": [f"row {i}" for i in range(size)],
        "labels": labels,
        "names": classes,
        "suspicion": wrong,
        "wrong": wrong,
        "suggested": (labels + 1) % len(classes),
        "first": np.arange(size),
        "same": np.arange(size),
        "share": ShareBelief(np.array([0.1, 0.2]), np.array([0.5, 0.5]), np.array([0.1, 0.2])),
        "flows": np.full((len(classes), len(classes)), size / len(classes) ** 2),
        "strength": {"gain": 0.2, "weak": False},
        "sources": {"features": 1.0},
    }
    return Findings(**values | changes)


class Reader(HTMLParser):
    """Collects tags, attributes and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(found: Findings, pool: Pool, top: int = 1000) -> tuple[str, Reader]:
    text = "".join(page_parts(found, pool, title="a <run>", top=top))  # type: ignore[arg-type]
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_texts_stay_texts() -> None:
    names = ["<good>", 'b"ad', "\u202eodd"]
    found = findings(len(NASTY), names)
    pool = Pool(NASTY, [names[label] for label in found.labels])  # type: ignore[union-attr]
    text, reader = page(found, pool)
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert not any("onclick" in attributes for _, attributes in reader.tags)
    assert {"b"} & {tag for tag, _ in reader.tags} == {"b"} and text.count("<b>") == 4, "the tiles' own"
    assert not set("\x00\x1b\u202e") & set(text)
    shown = "".join(reader.words)
    for nasty in (NASTY[0], NASTY[2]):
        assert " ".join(nasty.split()) in shown
    rows = [attributes for tag, attributes in reader.tags if tag == "tr" and "data-id" in attributes]
    assert len(rows) == len(NASTY)
    assert {attributes["data-label"] for attributes in rows} <= {"<good>", 'b"ad', "\u202eodd"}, "handed on as they are"
    places = [value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")]
    assert places == [], "nothing is loaded from elsewhere"


def test_what_is_handed_on_is_what_was() -> None:
    """Ids with blanks, tabs and no-break spaces, by which rows are left out again."""
    ids = ["A12 ", "\ttab", "no\u00a0break", "a\nb", 'q"<&>', "日本 \u200d"]
    found = findings(len(ids), ["no", "yes"], ids=ids)
    _, reader = page(found, Pool(["x"] * len(ids), ["no"] * len(ids)))
    rows = [attributes["data-id"] for tag, attributes in reader.tags if tag == "tr" and "data-id" in attributes]
    assert sorted(map(str, rows)) == sorted(ids)


def test_many_rows_are_shown_at_their_top() -> None:
    size = 100_000
    found = findings(size, ["no", "yes"])
    started = time.process_time()
    text, reader = page(found, Pool(["some words"] * size, ["no"] * size))
    assert time.process_time() - started < 30
    rows = [attributes for tag, attributes in reader.tags if tag == "tr" and "data-id" in attributes]
    assert 1000 <= len(rows) <= 1100
    assert rows[0]["data-id"] == f"row {np.argmax(found.suspicion)}"
    assert len(text) < 2_000_000


def test_answers_that_are_texts_have_no_probability() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("labels", "names", "wrong", "suggested", "share", "flows"))
    found = findings(3, ["a", "b"], **nothing, kind="causal", strength={"loss": 1.0})
    text, reader = page(found, Pool(["x", "y", "z"], ["an answer", "b", "c"]))
    assert "no probability" in text
    assert "an answer" in "".join(reader.words)


def test_fixes_name_what_is_wrong_and_what_is_a_copy(tmp_path: Path) -> None:
    same = np.array([0, 1, 0, 1, 4])
    found = findings(
        5, ["no", "yes"], first=same, same=same, labels=np.array([0, 1, 0, 0, 1]),
        wrong=np.array([0.1, 0.2, 0.3, 0.9, 0.6]), suspicion=np.array([0.1, 0.2, 0.3, 0.9, 0.6]),
        suggested=np.array([1, 0, 1, 1, 0]),
    )  # fmt: skip
    texts = ["a, b", 'say "c"', "a, b", 'say "c"', "=d\n"]
    pool = Pool(texts, ["no", "yes", "no", "no", "yes"])
    write_audit(found, pool, tmp_path, title="t", top=10)  # type: ignore[arg-type]
    with (tmp_path / "fixes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["reason"], row["suggested_label"]) for row in rows] == [
        ("row 3", "label is probably wrong; copy of row 1 with another label", "yes"),
        ("row 4", "label is probably wrong", "no"),
        ("row 2", "copy of row 0", ""),
    ]
    assert rows[0]["text"] == 'say "c"'
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["copies"] == 2
    with (tmp_path / "audit.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == texts
    assert [row["audit_rank"] for row in table] == ["5", "4", "3", "1", "2"]
    assert [row["audit_rank_in_label"] for row in table] == ["3", "2", "2", "1", "1"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read the script by")
def test_the_script_is_one(tmp_path: Path) -> None:
    (tmp_path / "page.js").write_text(SCRIPT, encoding="utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


def test_rows_off_the_query_are_listed() -> None:
    off = np.array([0.99, 0.1, 0.95, 0.0, 0.91, 0.8])
    quiet = {"wrong": np.array([0.1, 0.2, 0.9, 0.1, 0.1, 0.1])}
    found = findings(len(NASTY), ["a", "b"], off_query=off, **quiet)
    reasons = dict(found.fixes())
    assert reasons == {0: "off the query", 2: "label is probably wrong; off the query", 4: "off the query"}
    assert found.summary()["off the query"] == 3
    text, _ = page(found, Pool(NASTY, [found.label(i) for i in range(len(NASTY))]))
    listed = text[text.index("Off the query") :]
    assert [listed.count(f'<td class="number">{odds}</td>') for odds in ("99%", "95%", "91%", "80%")] == [1, 1, 1, 0]
    assert listed.index("99%") < listed.index("95%") < listed.index("91%")
    assert findings(3, ["a", "b"]).summary()["off the query"] is None
