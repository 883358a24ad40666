"""Advice, on a terminal."""

from __future__ import annotations

from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tsqlora_scale.advice.advice_result import AdviceResult
from tsqlora_scale.report.score_tables import plain

WORDS = {
    "query": "choose by the query: sampling.selector=query",
    "query alone": "train on the query's rows alone",
    "even": "draw uniformly",
}


def print_advice(result: AdviceResult) -> None:
    """The shares, the trials, the cost, and the verdict with the lines to use."""
    console, summary = Console(), result.summary
    whole = "all" if summary["looked at"] == summary["pool"] else str(summary["looked at"])
    queried = f", and {summary['query']} of the query" if summary["query"] else ""
    table = Table(title=f"{whole} of {summary['pool']} rows looked at{queried}")
    for name in ("of the pool", "about", "between"):
        table.add_column(name)
    notes = []
    for name, share in summary["shares"].items():
        if share is None:
            table.add_row(name, "-", "cannot be told")
            continue
        low, high = share["between"]
        table.add_row(name, f"{share['share']:.1%}", f"{low:.1%} and {high:.1%}")
        notes += [f"{name}: {share['note']}"] if "note" in share else []
    console.print(table)
    for note in notes:
        console.print(plain(note), soft_wrap=True)
    if "trials" in summary:
        console.print(_trials(summary["trials"]))
    seconds = summary["cost in seconds"]
    console.print(
        f"cost: the run's {seconds['steps']} steps take about {seconds['the run']:g} s (by {seconds['by']}), a look at "
        f"the whole pool {seconds['a look at the whole pool']:g} s ({seconds['look / run']:.1%} of them); this advice "
        f"took {seconds['seconds of this advice']:g} s",
        soft_wrap=True,
    )
    console.print(plain(f"verdict: {WORDS[result.verdict]}"), style="bold")
    for reason in result.reasons:
        console.print(plain(f"- {reason}"), soft_wrap=True)
    gain = summary["expected gain over even draws"]
    if gain is not None and result.verdict != "even" and "accuracy" in gain:
        console.print(f"expected gain over even draws: {_between(gain['accuracy'], '.1f', 100)} points")
    for line in yaml.safe_dump(result.config, sort_keys=False).splitlines():
        console.print(plain(f"    {line}"), soft_wrap=True)
    console.print(plain(f"all of it: {result.file}"), soft_wrap=True)


def _trials(trials: dict[str, Any]) -> Table:
    """Differences, in nats a row and in points of accuracy."""
    table = Table(title=f"trials by {trials['of']}, judged on {trials['judged on']} rows of the query")
    table.add_column("", no_wrap=True)
    table.add_column("nats a row")
    if "accuracy" in trials:
        table.add_column("points of accuracy")
    for name, nats in trials["nats a row"].items():
        points = trials.get("accuracy", {}).get(name)
        table.add_row(name, _between(nats, ".3f"), *([] if points is None else [_between(points, ".1f", 100)]))
    return table


def _between(values: list[float], form: str, times: float = 1) -> str:
    mean, low, high = (f"{times * value:+{form}}" for value in values)
    return f"{mean} ({low} to {high})"
