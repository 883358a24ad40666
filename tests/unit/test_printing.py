"""What samples and file names may do to a terminal: nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable, shortened, shown
from tsqlora_scale.report import score_tables

HOSTILE = (
    "\x1b[31mred\x1b]8;;http://x\x1b\\ \x9b2J [bold]loud[/bold] [link=http://x]y[/link] [/] :bomb: \u202eabc \x07\b\0"
)


@given(st.text())
def test_nothing_that_controls_a_terminal_is_left(text: str) -> None:
    found = printable(text)
    assert found.replace("\u200c", "").replace("\u200d", "").isprintable()
    assert printable(found) == found
    if text.isprintable():
        assert found == text


@given(st.text(), st.integers(1, 40))
def test_shortening(text: str, limit: int) -> None:
    found = shortened(text, limit)
    assert len(found) <= limit
    assert found == text if len(text) <= limit else "…" in found
    assert len(shown(text, limit)) <= limit


def test_values_are_shown_as_python_writes_them() -> None:
    assert shown("a'b") == '"a\'b"'
    assert shown([1, "x"]) == "[1, 'x']"
    assert shown("x" * 10**7) == "'" + "x" * 73 + "…" + "x" * 24 + "'"


@given(st.text())
def test_a_users_mistake_is_one_line(text: str) -> None:
    line = str(UserError(f"{text}: wrong; mend it"))
    assert len(line.splitlines()) == 1
    assert len(line) <= 2000


def test_what_is_not_finite_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"quality": 1.0, "convergence": None, "loss": None}
    entry: dict[str, Any] = {"sample_id": "s", "text": "t", "answer": "a", **numbers}
    score_tables.Console().print(score_tables._samples("worst", [entry], ("quality", "convergence", "loss")))
    assert ["s", "1.000", "-", "-", "a", "t"] in [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]


def test_samples_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, where rich would write colours and links."""
    out = io.StringIO()
    monkeypatch.setattr(score_tables, "Console", lambda: Console(file=out, force_terminal=True, width=400))
    numbers = {"quality": 1.0, "convergence": 1.0, "loss": 1.0}
    entry: dict[str, Any] = {"sample_id": HOSTILE, "text": HOSTILE, "answer": HOSTILE, **numbers}
    summary = {
        "scored": 1, "pool": 1, "warm-up steps": 0, "quantiles": [0.5], "distribution": {"loss": [1.0]},
        "best": [entry], "similar": [{"samples": 1, "first": [entry]}], "similarity": 0.9,
        "samples with a similar one": 1,
    }  # fmt: skip
    score_tables.print_scores(summary, f"runs/{HOSTILE}/scores")
    printed = out.getvalue()
    for character in "\x9b\u202e\x07\b\0":
        assert character not in printed
    assert "\x1b]8" not in printed
    assert "\x1b[31m" not in printed
    expected = printable(" ".join(HOSTILE.split()))
    assert "[bold]loud[/bold] [link=http://x]y[/link] [/] :bomb:" in expected
    assert printed.count(expected[40:80]) == 7, "id, answer and text of two lists, and the folder"
