"""What scoring a pool has found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsqlora_scale.common.printing import printable

WIDTH = 90


def print_scores(summary: dict[str, Any], file: str) -> None:
    """Tables of the distribution, of the ends of the ranking, and of similar samples; and where the scores are."""
    console = Console()
    table = Table(title=f"{summary['scored']} of {summary['pool']} samples scored, {summary['warm-up steps']} steps in")
    table.add_column("term", no_wrap=True, min_width=11)
    for quantile in summary["quantiles"]:
        table.add_column(f"{quantile:.0%}", justify="right")
    for term, values in summary["distribution"].items():
        table.add_row(term, *(f"{value:.4g}" for value in values))
    console.print(table)
    columns = summary.get("columns", ("quality", "convergence", "loss"))
    for name, value in findings_told(summary.get("findings", {})):
        console.print(plain(f"{name}: {value}"))
    if "kept" in summary:
        console.print(f"kept: {summary['kept']} of {summary['pool']} samples")
    groups = summary.get("ranked within", "the pool")
    within = "" if groups == "the pool" else f", within their {groups}"
    for title in ("best", "worst", "most against the others"):
        if summary.get(title):
            console.print(_samples(title + within, summary[title], columns))
    if "similar" in summary:
        console.print(
            f"{summary['samples with a similar one']} samples have one whose gradient is the same to a cosine of "
            f"{summary['similarity']:g}"
        )
        for group in summary["similar"]:
            console.print(_samples(f"{group['samples']} similar samples", group["first"], columns))
    console.print(plain(f"scores: {file}"), soft_wrap=True)  # one line, to be copied


def plain(text: str) -> Text:
    """Text as it is: no markup, no emoji codes, no control characters. Samples may hold any of them."""
    return Text(printable(text))


def findings_told(findings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a selector has found, as names and values for people."""
    for name, value in findings.items():
        told = value
        if isinstance(value, bool):
            told = "yes" if value else "no"
        elif isinstance(value, Mapping):
            told = ", ".join(f"{key} {each}" for key, each in value.items())
        yield name, str(told)


def _samples(title: str, entries: list[dict[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("sample", *("Q" if name == "quality" else name for name in columns), "answer", "text"):
        table.add_column(name)
    for entry in entries:
        text = " ".join(entry["text"].split())
        text = text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
        answer = entry["answer"][:WIDTH]
        numbers = ["-" if entry[name] is None else f"{entry[name]:.3f}" for name in columns]  # not finite
        table.add_row(plain(entry["sample_id"][:WIDTH]), *numbers, plain(answer), plain(text))
    return table
