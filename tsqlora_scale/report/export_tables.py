"""Adapters cut to lower ranks, and tasks before and after training, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tsqlora_scale.report.score_tables import plain


def print_truncations(rows: Sequence[Mapping[str, Any]], out: str) -> None:
    """A line of the adapter as it is, and one of every rank that it was cut to.

    Args:
        rows: of :func:`tsqlora_scale.run.truncations.write_truncations`.
        out: where the adapters are.
    """
    metrics = list(rows[0].get("metrics", {}))
    table = Table("rank", "parameters", "lost of the update", *metrics, title=plain(f"cut to lower ranks: {out}"))
    for row in rows:
        name = "as trained" if row["rank"] is None else str(row["rank"])
        measured = [f"{row['metrics'][metric]:.4f}" for metric in metrics]
        table.add_row(name, f"{row['parameters']:,}", f"{100 * row['error']:.2f} %", *measured)
    Console().print(table)


def print_tasks(results: Mapping[str, Mapping[str, Mapping[str, float]]], adapter: str) -> None:
    """A line of every metric of every task: the base, and the adapter on it.

    Args:
        results: of :func:`tsqlora_scale.run.harness.evaluate_tasks`.
        adapter: what was measured.
    """
    table = Table("task", "metric", "base", "adapter", title=plain(f"lm-evaluation-harness: {adapter}"))
    for task, metrics in results.items():
        for metric, row in metrics.items():
            cells = []
            for side in ("base", "adapter"):
                error = row.get(f"{side}_stderr")
                cells.append(f"{row[side]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
            table.add_row(plain(task), plain(metric), *cells)
    Console().print(table)
