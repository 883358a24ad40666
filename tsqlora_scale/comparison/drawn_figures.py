"""Which figures there are of a comparison, and of run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.comparison.estimates import Estimate, mean_of
from tsqlora_scale.comparison.figures import (
    Point,
    draw_distributions,
    draw_metric,
    draw_ranks_against_sensitivity,
    draw_ranks_over_time,
    draw_samples,
)
from tsqlora_scale.comparison.findings_of_arms import Found, MethodRuns, TaskTable, seconds_of
from tsqlora_scale.comparison.run_folder import FinishedRun, read_run

#: Phases that a method costs.
OF_METHOD = ("training", "scoring", "resizing")
#: Runs that one figure of distributions tells apart.
MOST_RUNS = 6


def draw_comparison(found: Found, out: Path, *, kind: str = "svg") -> list[Path]:
    """Draw what there is to draw of a comparison; the files.

    Of every table ``samples``, ``metric`` and, over the runs of its first seed, ``scores``; of every method that
    changes ranks ``sensitivity`` and ``ranks``, of its first seed.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    files: list[Path] = []
    counts: dict[str, int] = {}
    for table in found.tables:
        counts[table.task] = counts.get(table.task, 0) + 1
        stem = table.task if counts[table.task] == 1 else f"{table.task}-{counts[table.task]}"
        title = found.trials.comparison.tasks[table.task].title or table.task
        points = [_point(table, name, runs) for name, runs in table.methods.items()]
        files.append(out / f"{stem}-samples.{kind}")
        draw_samples(points, files[-1], title=title)
        files.append(out / f"{stem}-metric.{kind}")
        draw_metric(points, files[-1], metric=table.titles[table.metrics[0]], title=title)
        files += _draw_runs([_first_run(found, table, name) for name in table.methods], out, stem, kind)
    return files


def draw_runs(folders: Sequence[Path], out: Path, *, kind: str = "svg") -> list[Path]:
    """The same of run folders, each a point of its own.

    Raises:
        UserError: one of them holds no finished run; or as :func:`draw_comparison`.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.label for run in runs]
    runs = [  # two of one name are told apart by where they lie
        run if names.count(run.label) == 1 else FinishedRun(run.folder, str(run.folder), run.result, run.events)
        for run in runs
    ]
    files = [out / f"runs-samples.{kind}"]
    points = [_point_of(run) for run in runs]
    draw_samples(points, files[0])
    metrics = dict.fromkeys(name for run in runs for name in list(run.result["metrics"])[:1])
    for name in metrics:  # runs that are judged otherwise have a figure of their own
        mine = [
            point for run, point in zip(runs, points, strict=True) if name == next(iter(run.result["metrics"]), None)
        ]
        files.append(out / f"runs-{name.replace('/', '-')}.{kind}")
        draw_metric(mine, files[-1], metric=name)
    return files + _draw_runs(runs, out, "runs", kind)


def _draw_runs(runs: Sequence[FinishedRun], out: Path, stem: str, kind: str) -> list[Path]:
    """Distributions of scores of all, sensitivities and ranks of each."""
    files = []
    scored = [run for run in runs if any((run.folder / "scores").glob("pass-*.parquet"))]
    for start in range(0, len(scored), MOST_RUNS):
        part = "" if len(scored) <= MOST_RUNS else f"-{start // MOST_RUNS + 1}"
        path = out / f"{stem}-scores{part}.{kind}"
        if draw_distributions(scored[start : start + MOST_RUNS], path):
            files.append(path)
    for run in runs:
        if run.ranks_change:
            name = f"{stem}-{''.join(c if c.isalnum() or c in '-_.' else '_' for c in run.label)}"
            files += [out / f"{name}-sensitivity.{kind}", out / f"{name}-ranks.{kind}"]
            draw_ranks_against_sensitivity(run, files[-2])
            draw_ranks_over_time(run, files[-1])
    return files


def _first_run(found: Found, table: TaskTable, name: str) -> FinishedRun:
    """The run of a method's first seed."""
    runs = table.methods[name]
    seed = next(iter(runs.runs))
    return read_run(found.folders[table.task, name, seed], name)


def _point(table: TaskTable, name: str, runs: MethodRuns) -> Point:
    return Point(
        label=name,
        parameters=runs.median("trainable_parameters"),
        seconds=sum(runs.seconds(phase) for phase in OF_METHOD),
        metric=mean_of(runs.values(table.metrics[0])),
        samples=runs.median("distinct_samples_seen"),
        samples_per_second=float(np.median([run["samples_per_second"] or 0.0 for run in runs.runs.values()])),
    )


def _point_of(run: FinishedRun) -> Point:
    result: dict[str, Any] = run.result
    value = float(next(iter(result["metrics"].values()), float("nan")))
    return Point(
        label=run.label,
        parameters=float(result["trainable_parameters"]),
        seconds=sum(seconds_of(result, phase) for phase in OF_METHOD),
        metric=Estimate(value, float("nan"), float("nan")),
        samples=float(result["distinct_samples_seen"]),
        samples_per_second=float(result["samples_per_second"] or 0.0),
    )
