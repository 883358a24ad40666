"""Figures of runs and of comparisons, as the papers have them; matplotlib is imported where one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, written_whole
from tsqlora_scale.comparison.estimates import Estimate
from tsqlora_scale.comparison.run_folder import FinishedRun, places_of

#: Colours that are told apart by everybody (Okabe and Ito), and markers for when there are more lines than colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "os^Dvp*XPh<>"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 150,
    "svg.hashsalt": "tsqlora",
}
#: Above so many cells of a grid of ranks the numbers are not written into it.
MOST_NUMBERS = 400


@dataclass(frozen=True)
class Point:
    """A method in a figure of methods."""

    label: str
    parameters: float
    seconds: float
    metric: Estimate
    samples: float
    samples_per_second: float


@contextmanager
def canvas(path: Path, columns: int = 1, *, width: float, height: float) -> Iterator[Any]:
    """Axes to draw on, (columns,); the file is written whole at the end.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib; run: pip install 'tsqlora-scale[figures]'") from None
    with matplotlib.rc_context(STYLE):  # nothing of pyplot: no state is left in the process
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(1, columns, squeeze=False)[0]
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else None  # the same figure is the same file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                figure.savefig(partial, format=kind, metadata=metadata)
        except WRITE_ERRORS as error:
            raise UserError(f"{path}: cannot be written ({error}); make room, or give another --out") from None


def draw_samples(points: Sequence[Point], path: Path, *, title: str = "") -> None:
    """How many different training samples were seen, and how many went by in a second (TsqLoRA, Fig. 2)."""
    with canvas(path, 2, width=8, height=1.2 + 0.32 * len(points)) as axes:
        places = np.arange(len(points))[::-1]
        panels = (("different training samples seen", "samples"), ("training samples per second", "samples_per_second"))
        for axis, (name, key) in zip(axes, panels, strict=True):
            values = [getattr(point, key) for point in points]
            axis.barh(places, values, height=0.7, color=[colour(place) for place in range(len(points))])
            axis.set_title(name)
            axis.set_yticks(places, [point.label for point in points] if axis is axes[0] else [])
            axis.grid(False, axis="y")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_xlim(0, 1.18 * max([*values, 1e-9]))
            for place, value in zip(places, values, strict=True):
                axis.text(value, place, f" {value:,.0f}" if value >= 100 else f" {value:.1f}", va="center", fontsize=8)
        axes[0].figure.suptitle(title)


def draw_ranks_against_sensitivity(run: FinishedRun, path: Path) -> None:
    """Sensitivity and final rank of every layer, by block and kind, and one against the other (TsqLoRA, Fig. 3)."""
    event = run.events[-1]
    sensitivity, ranks = event["sensitivity"], event["ranks"]
    names = [name for name in ranks if name in sensitivity]
    places = places_of(names)
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    blocks = sorted({place.block for place in places.values()})
    total = sum(sensitivity[name] for name in names) or 1.0
    grids = {key: np.full((len(kinds), len(blocks)), np.nan) for key in ("share", "rank")}
    for name, place in places.items():
        cell = kinds.index(place.kind), blocks.index(place.block)
        grids["share"][cell], grids["rank"][cell] = sensitivity[name] / total, ranks[name]
    width = 5.4 + 0.62 * max(len(blocks), 6)
    with canvas(path, 3, width=width, height=1.5 + 0.36 * max(len(kinds), 5)) as axes:
        _grid(axes[0], 100 * grids["share"], kinds, blocks, title="sensitivity, % of all", form=".1f", colours="Blues")
        _grid(axes[1], grids["rank"], [""] * len(kinds), blocks, title="final rank", form=".0f", colours="Oranges")
        for number, kind in enumerate(kinds):
            mine = [name for name in names if places[name].kind == kind]
            axes[2].plot(
                [100 * sensitivity[name] / total for name in mine], [ranks[name] for name in mine],
                linestyle="", marker=MARKERS[number % len(MARKERS)], color=colour(number), markersize=5, label=kind,
            )  # fmt: skip
        axes[2].set_xlabel("sensitivity, % of all")
        axes[2].set_ylabel("final rank")
        axes[2].set_ylim(bottom=0)
        axes[2].legend(fontsize=7, loc="best")
        axes[2].set_title("rank against sensitivity")
        axes[2].figure.suptitle(f"{run.label}: after the event of step {event['step']}")


def draw_distributions(runs: Sequence[FinishedRun], path: Path) -> bool:
    """Distributions of loss, gradient norm and quality over the scored samples (TsqLoRA, Fig. 4); whether there are
    any."""
    found = [(run, scores) for run in runs if (scores := run.scores())]
    names = list(dict.fromkeys(name for _, scores in found for name in scores))
    if not names:
        return False
    with canvas(path, len(names), width=3.1 * len(names), height=2.7) as axes:
        for axis, name in zip(axes, names, strict=True):
            values = [scores[name] for _, scores in found if name in scores]
            low, high = np.quantile(np.concatenate(values), [0.0, 0.99])  # a few outliers would flatten the rest
            count = int(np.clip(2 * np.sqrt(min(map(len, values))), 8, 40))
            bins = np.linspace(low, high if high > low else low + 1, count + 1)
            for number, (run, scores) in enumerate(found):
                if name in scores:
                    shown = np.clip(scores[name], bins[0], bins[-1])
                    style = (
                        {"histtype": "step", "linewidth": 2.4 * 0.6**number + 0.8} if len(found) > 1 else {"alpha": 0.8}
                    )
                    axis.hist(shown, bins, weights=np.full(len(shown), 100 / len(shown)), color=colour(number),
                              label=f"{run.label} ({len(shown):,})", **style)  # fmt: skip
            axis.set_xlabel(f"{name} (last bar: all above)")
            axis.grid(False, axis="x")
            axis.locator_params(axis="x", nbins=5)
        axes[0].set_ylabel("% of the scored samples")
        if len(found) > 1:
            axes[-1].legend(fontsize=7)
        else:
            axes[0].figure.suptitle(f"{found[0][0].label}: {len(next(iter(found[0][1].values()))):,} scored samples")
    return True


def draw_ranks_over_time(run: FinishedRun, path: Path) -> None:
    """Mean rank of the layers of each kind over the steps, and the total."""
    places = places_of(list(run.events[-1]["ranks"]))
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    start = _start_of(run, list(places))
    steps = [0, *(event["step"] for event in run.events)]
    states = [start, *(event["ranks"] for event in run.events)]
    last = max(run.result.get("steps", 0), steps[-1])
    with canvas(path, 2, width=9.2, height=max(3.1, 0.9 + 0.19 * len(kinds))) as axes:
        for number, kind in enumerate(kinds):
            values = [
                float(np.mean([state.get(name, 0) for name, place in places.items() if place.kind == kind]))
                for state in states
            ]
            axes[0].step(
                [*steps, last], [*values, values[-1]], where="post", color=colour(number), label=kind,
                marker=MARKERS[number % len(MARKERS)], markersize=3.5, linewidth=1.2,
            )  # fmt: skip
        totals = [sum(state.values()) for state in states]
        axes[1].step([*steps, last], [*totals, totals[-1]], where="post", color="black")
        axes[0].set_ylabel("mean rank of a layer")
        axes[1].set_ylabel("total rank")
        axes[1].set_ylim(0, 1.1 * max(totals))
        axes[0].set_ylim(bottom=0)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        for axis in axes:
            axis.set_xlabel("optimizer steps")
            axis.set_xlim(0, last)
        axes[0].figure.suptitle(run.label)


def draw_metric(points: Sequence[Point], path: Path, *, metric: str, title: str = "") -> None:
    """A metric against trainable parameters, and against wall time, with the means' intervals."""
    with canvas(path, 2, width=8.4, height=3.3 + 0.14 * max(0, len(points) - 8)) as axes:
        panels = (("trainable parameters", "parameters"), ("seconds of training, scoring, resizing", "seconds"))
        for axis, (name, key) in zip(axes, panels, strict=True):
            for number, point in enumerate(points):
                estimate, value = point.metric, getattr(point, key)
                known = not math.isnan(estimate.low)
                errors = [[estimate.value - estimate.low], [estimate.high - estimate.value]] if known else None
                axis.errorbar(
                    [value], [estimate.value], yerr=errors, marker=MARKERS[number % len(MARKERS)], color=colour(number),
                    capsize=2.5, markersize=5.5, linestyle="", label=point.label,
                )  # fmt: skip
            values = [getattr(point, key) for point in points]
            if min(values) > 0 and max(values) > 20 * min(values):
                axis.set_xscale("log")
            else:
                axis.ticklabel_format(axis="x", style="plain")
                axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
                axis.locator_params(axis="x", nbins=5)
            axis.set_xlabel(name)
        axes[0].set_ylabel(metric)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        axes[0].figure.suptitle(title)


def colour(number: int) -> str:
    """The colour of a line or bar by its number."""
    return COLOURS[number % len(COLOURS)]


def _grid(
    axis: Any, values: np.ndarray, kinds: Sequence[str], blocks: Sequence[int], *, title: str, form: str, colours: str
) -> None:
    """Values (kinds, blocks) as a coloured grid, with the numbers in it where there is room."""
    axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=max(float(np.nanmax(values)), 1e-12))
    axis.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_xlabel("block")
    axis.set_title(title)
    axis.grid(False)
    if values.size > MOST_NUMBERS:
        return
    middle = float(np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            shade = "white" if value > middle * 1.2 else "black"
            axis.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=7, color=shade)


def _start_of(run: FinishedRun, names: Sequence[str]) -> dict[str, int]:
    """The ranks before the first event, by the names that events use."""
    found = run.result.get("ranks_start", {})
    ends = {name: next((rank for short, rank in found.items() if name.endswith(short)), 0) for name in names}
    return {name: int(rank) for name, rank in ends.items()}
