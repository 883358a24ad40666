"""Tables of a comparison: markdown for people, csv for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.files import written_whole
from tsqlora_scale.comparison.estimates import Estimate, mean_of
from tsqlora_scale.comparison.findings_of_arms import PHASES, Found, TaskTable

EXPLANATION = (
    "Means over seeds with percentile bootstrap intervals (95 %, seeds resampled; with few seeds rather too narrow). "
    "The difference to the baseline is paired by seed; p is of the two-sided sign-flip test, not corrected for the "
    "number of rows (with n seeds it is 2/2^n at least). Seconds are medians of wall time; peak memory is that of the "
    "GPU's allocator, on a CPU of the whole process."
)


def write_tables(found: Found, out: Path) -> str:
    """Write ``tables.md``, ``tables.csv`` (a row a method and task), ``runs.csv`` (a row a run); the first's text."""
    text = markdown(found)
    files = {"tables.md": text, "tables.csv": _csv(summary_rows(found)), "runs.csv": _csv(run_rows(found))}
    for name, content in files.items():
        with written_whole(out / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return text


def markdown(found: Found) -> str:
    """All tables."""
    comparison = found.trials.comparison
    lines = [f"# {comparison.title or comparison.name}", ""]
    if comparison.stand_ins:
        lines += [comparison.stand_ins, ""]
    if len({table.task for table in found.tables}) > 1 or comparison.published:
        lines += overview(found)
    for table in found.tables:
        lines += detailed(found, table)
    if found.tables:
        lines += [EXPLANATION, ""]
    for title, parts in (
        ("Failed", [f"{name}: {why}" for name, why in found.failures.items()]),
        ("Not run", found.missing),
    ):
        if parts:
            lines += [f"{title}:", "", *(f"- {part}" for part in parts), ""]
    return "\n".join(lines)


def overview(found: Found) -> list[str]:
    """Means of the deciding metrics in percent, a row a method, a column a task; published rows in italics."""
    comparison = found.trials.comparison
    tasks = list(comparison.tasks)
    by_task: dict[str, list[TaskTable]] = {}
    for table in found.tables:
        by_task.setdefault(table.task, []).append(table)
    titles = [comparison.tasks[task].title or task for task in tasks]
    lines = ["| method | parameters | " + " | ".join(titles) + " | mean |", "|---" * (len(tasks) + 3) + "|"]
    for method in comparison.methods:
        cells, means, scales = [], [], set()
        parameters: float | None = None
        for task in tasks:
            mixed = len(by_task.get(task, [])) > 1  # then the tables below tell them apart
            runs = [table.methods[method] for table in by_task.get(task, []) if method in table.methods]
            if len(runs) != 1 or mixed:
                cells.append("see below" if mixed and runs else "-")
                continue
            parameters = parameters or runs[0].median("trainable_parameters")
            table = by_task[task][0]
            times = [_times(name, table) for name in table.metrics]
            values = [
                scale * float(np.mean(runs[0].values(name))) for scale, name in zip(times, table.metrics, strict=True)
            ]
            means.append(values[0])
            scales.add(times[0])
            cells.append(" / ".join(f"{value:.2f}" for value in values))
        # percents and losses have no mean
        whole = f"{float(np.mean(means)):.2f}" if len(means) == len(tasks) and len(scales) == 1 else "-"
        lines.append(f"| {method} | {_count(parameters)} | {' | '.join(cells)} | {whole} |")
        if method in comparison.published:
            told = comparison.published[method]
            cells = [_published(told.get(task)) for task in tasks]
            row = [str(told.get("parameters", "")), *cells, _published(told.get("mean"))]
            lines.append(f"| *{method}, published* | {' | '.join(row)} |")
    for method, told in comparison.published.items():  # of methods that are not among ours
        if method not in comparison.methods:
            row = [
                str(told.get("parameters", "")),
                *(_published(told.get(t)) for t in tasks),
                _published(told.get("mean")),
            ]
            lines.append(f"| *{method}, published* | {' | '.join(row)} |")
    return [*lines, ""]


def _times(metric: str, table: TaskTable) -> int:
    """100 for a fraction, of which more is better, and 1 for a loss. A task's own metric, which is not ours, is as the
    one that decides."""
    from tsqlora_scale.tasks.metrics import METRICS

    known = METRICS.get(metric.rpartition("/")[2])
    is_fraction: bool = table.identity["task"]["higher_is_better"] if known is None else known.higher_is_better
    return 100 if is_fraction else 1


def detailed(found: Found, table: TaskTable) -> list[str]:
    """One task's table."""
    comparison, trials = found.trials.comparison, found.trials
    title = comparison.tasks[table.task].title or table.task
    model, code = table.identity["model"], table.identity["code"]
    seeds = max(len(method.runs) for method in table.methods.values())
    wanted = len(comparison.seeds)
    about = (
        f"Model {_model(model)}, code {code['version']} ({_source(code, 8)}), data {_digests(table)}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
    has_baseline = comparison.baseline is not None
    header = ["method", "parameters", *(table.titles[name] for name in table.metrics)]
    header += [f"{table.titles[table.metrics[0]]} - {comparison.baseline}", "p"] if has_baseline else []
    header += ["lr", "steps", *(f"{phase} s" for phase in PHASES), "peak MiB"]
    lines = [
        f"## {title}",
        "",
        f"{about}.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for name, runs in table.methods.items():
        few = "" if len(runs.runs) == wanted else f" ({len(runs.runs)} of {wanted} seeds)"
        cells = [f"{name}{few}", _count(runs.median("trainable_parameters"))]
        cells += [with_interval(mean_of(runs.values(metric))) for metric in table.metrics]
        if has_baseline:
            against = table.difference(name, trials.baseline(name))
            cells += ["-", "-"] if against is None else [with_interval(against[0], "+.4f"), _number(against[1], ".3f")]
        cells += [f"{runs.lr:g}", f"{runs.median('steps'):.0f}", *(f"{runs.seconds(phase):.1f}" for phase in PHASES)]
        lines.append(f"| {' | '.join([*cells, f'{runs.peak_bytes / 2**20:.0f}'])} |")
    return [*lines, ""]


def summary_rows(found: Found) -> list[dict[str, Any]]:
    """A row for every method and task of every table."""
    rows = []
    for table in found.tables:
        for name, runs in table.methods.items():
            row: dict[str, Any] = {"task": table.task, "method": name, **_identity(table), "seeds": len(runs.runs)}
            for metric in table.metrics:
                estimate = mean_of(runs.values(metric))
                row |= {metric: estimate.value, f"{metric} low": estimate.low, f"{metric} high": estimate.high}
            baseline = found.trials.baseline(name)
            against = table.difference(name, baseline)
            if against is not None:
                row |= {"baseline": baseline, "difference": against[0].value, "difference low": against[0].low}
                row |= {"difference high": against[0].high, "p": against[1]}
            row |= {"parameters": runs.median("trainable_parameters"), "lr": runs.lr, "steps": runs.median("steps")}
            row |= {f"{phase} seconds": runs.seconds(phase) for phase in PHASES}
            rows.append(row | {"peak bytes": runs.peak_bytes})
    return rows


def run_rows(found: Found) -> list[dict[str, Any]]:
    """A row for every run that a table has."""
    rows = []
    for table in found.tables:
        for name, runs in table.methods.items():
            for seed, result in runs.runs.items():
                row = {"task": table.task, "method": name, "seed": seed, **_identity(table), "lr": runs.lr}
                row |= {f"data {split}": digest for split, digest in result["data"].items()}
                keys = ("steps", "samples_drawn", "distinct_samples_seen", "trainable_parameters", "samples_per_second")
                row |= {**result["metrics"], **{key: result[key] for key in keys}}
                row |= {f"{phase} seconds": value for phase, value in result["seconds"].items()}
                rows.append(row | {"peak bytes": max(result["peak_memory_bytes"]), "engine": result["engine"]})
    return rows


def with_interval(estimate: Estimate, form: str = ".4f") -> str:
    """``0.8412 [0.8333, 0.8490]``."""
    if math.isnan(estimate.low):
        return _number(estimate.value, form)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _identity(table: TaskTable) -> dict[str, Any]:
    model, code = table.identity["model"], table.identity["code"]
    return {"model": _model(model), "code": f"{code['version']} {_source(code)}"}


def _source(code: dict[str, Any], digits: int = 16) -> str:
    """The digest of the code, and of the code that had made a part of the runs before."""
    earlier = ", ".join(each[:digits] for each in code.get("earlier", ()))
    return str(code["source"])[:digits] + (f", begun with {earlier}" if earlier else "")


def _model(model: dict[str, Any]) -> str:
    marks = [model[key] for key in ("revision", "commit") if model.get(key)]
    marks += [model[key] for key, usual in (("dtype", "fp32"), ("quantization", "none")) if model.get(key) != usual]
    return " ".join([str(model["name"]), *(str(mark)[:12] for mark in marks)])


def _digests(table: TaskTable) -> str:
    """Digests of the held-out rows, and of those trained on; where these differ, how many."""
    parts = []
    for split in ("train", "dev"):
        found = sorted(
            {str(run["data"][split])[:8] for method in table.methods.values() for run in method.runs.values()}
        )
        parts.append(
            f"{split} {found[0]}" if len(found) == 1 else f"{split} of {len(found)} kinds by seed, query or variant"
        )
    return ", ".join(parts)


def _published(value: float | str | None) -> str:
    return "-" if value is None else f"*{value}*"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _csv(rows: list[dict[str, Any]]) -> str:
    """Rows under the columns of all of them, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return json.dumps(value) if isinstance(value, dict | list) else value
