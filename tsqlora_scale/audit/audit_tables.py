"""What an audit has found, on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tsqlora_scale.report.score_tables import WIDTH, plain


def print_audit(summary: dict[str, Any], suspects: list[dict[str, Any]], page: str, fixes: str) -> None:
    """The share of wrong labels, the labels, the most suspect samples, and where all of it is."""
    console = Console()
    if summary["share of wrong labels"] is None:
        console.print("texts as answers: samples are ordered by their loss, which is no probability of being wrong")
    else:
        low, high = summary["between"]
        console.print(
            f"about {summary['share of wrong labels']:.1%} of {summary['samples']} labels are wrong "
            f"({low:.1%} to {high:.1%} with 90 % probability)"
        )
    if summary["strength"].get("weak"):
        console.print("what the samples were judged by hardly tells one label from another: this says little")
    if summary["classes"]:
        table = Table(title="by label")
        for name in ("label", "samples", "expected wrong", "share", "most often"):
            table.add_column(name)
        for entry in summary["classes"]:
            numbers = [str(entry["samples"]), str(entry["expected wrong"]), f"{entry['share']:.1%}"]
            table.add_row(plain(entry["label"][:WIDTH]), *numbers, plain(entry["most often"][:WIDTH]))
        console.print(table)
    table = Table(title="most suspect")
    for name in ("sample", "probability", "label", "probably", "text"):
        table.add_column(name)
    for entry in suspects:
        text = entry["text"] if len(entry["text"]) <= WIDTH else entry["text"][: WIDTH - 1] + "…"
        odds = f"{entry['suspicion']:.3f}" if entry["probability"] is None else f"{entry['probability']:.0%}"
        labels = [plain(entry[name][:WIDTH]) for name in ("label", "suggested")]
        table.add_row(plain(entry["sample_id"][:WIDTH]), odds, *labels, plain(text))
    console.print(table)
    console.print(f"{summary['copies']} samples are copies or near-copies of others")
    if summary["off the query"] is not None:
        console.print(f"{summary['off the query']} samples are probably none of what the query wants")
    console.print(plain(f"page: {page}"), soft_wrap=True)
    console.print(plain(f"fixes: {fixes}"), soft_wrap=True)
