#!/usr/bin/env python3
"""The tables of a study, in Markdown, from what run.py has left.

    python benchmarks/studies/tables.py OUT/results.jsonl [--into docs/results.md]

``--into`` puts them between the lines ``<!-- study NAME -->`` and ``<!-- end of study NAME -->`` of a page. Every arm
that was run is in them, whatever came of it. For the columns see :data:`EXPLANATION`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.arms import ARMS  # noqa: E402
from benchmarks.studies.fair import (  # noqa: E402
    Choice,
    Trial,
    after_equal_time,
    choose,
    read_failures,
    read_trials,
    signed,
    step_of,
    way,
)
from benchmarks.studies.plans import STUDIES, Study  # noqa: E402
from tsqlora_scale.comparison.estimates import Estimate, mean_of  # noqa: E402

#: Pools of which each gets a table of its own; of more than these only the overview is written.
DETAILED = 8
EXPLANATION = (
    "`test`: mean over the seeds at the step (and with the learning rate) that tuning chose; `best`: of each run the "
    "step that is best on `tune`; differences are paired by seed and positive where the arm is better, with bootstrap "
    "95 % intervals over seeds; `of the way`: from the better baseline to the oracle; `equal time`: less the better "
    "baseline after as many more steps as the choice took seconds (`>`: its curve ends before); `choice`: seconds, "
    "and what they are in steps; `kept`: rows, and the share of draws among them that good ones get."
)


@dataclass(frozen=True)
class ArmRuns:
    """The runs of an arm on a pool that are reported, by seed, and what tuning has chosen for it."""

    name: str
    choice: Choice
    runs: dict[int, Trial]
    most: int

    def step(self, seed: int) -> int:
        """That is reported."""
        return step_of(self.runs[seed], self.choice, judged_by=ARMS[self.name].judged_by, most=self.most)

    def last(self, seeds: Sequence[int]) -> list[float]:
        """Values on ``test`` at the chosen step."""
        return [self.runs[seed].value(self.step(seed), "test") for seed in seeds]

    def best(self, seeds: Sequence[int]) -> list[float]:
        """Values on ``test`` at the step that is best on ``tune``, of the run itself; NaN of runs without ``tune``."""
        runs = [self.runs[seed] for seed in seeds]
        if not all("tune" in run.curve[run.last_step] for run in runs):
            return [math.nan] * len(runs)
        return [run.value(run.best_step("tune", self.most), "test") for run in runs]

    def signed(self, seeds: Sequence[int], *, best: bool = False) -> list[float]:
        """As :meth:`last` or :meth:`best`; more is better."""
        return [signed(value, self.runs[seeds[0]].metric) for value in (self.best if best else self.last)(seeds)]


@dataclass(frozen=True)
class PoolRuns:
    """All arms of a pool, and the seeds that all of them have."""

    pool: str
    arms: dict[str, ArmRuns]
    seeds: list[int]
    study: Study
    #: Arms of fewer than half as many seeds as others.
    short: list[str]

    @property
    def metric(self) -> str:
        """Of the pool."""
        return next(iter(next(iter(self.arms.values())).runs.values())).metric

    def baseline(self) -> str | None:
        """The baseline with the better mean."""
        there = [name for name in self.study.baselines if name in self.arms]
        return max(there, key=lambda name: float(np.mean(self.arms[name].signed(self.seeds))), default=None)


def gather(trials: Sequence[Trial], study: Study, *, most: int, tuning: Sequence[int]) -> list[PoolRuns]:
    """The runs by pool and arm, in the study's order."""
    pools = list(dict.fromkeys([*study.pools, *sorted({trial.key.pool for trial in trials})]))
    found = []
    for pool in pools:
        arms: dict[str, ArmRuns] = {}
        for name in dict.fromkeys([*study.arms, *ARMS]):
            own = [trial for trial in trials if (trial.key.pool, trial.key.arm) == (pool, name)]
            choice = choose(own, seeds=tuning, judged_by=ARMS[name].judged_by, most=most)
            runs = {
                trial.key.seed: trial
                for trial in own
                if choice is not None and trial.key.seed not in tuning and trial.key.lr == choice.lr
            }
            if choice is not None and runs:
                arms[name] = ArmRuns(name, choice, runs, most)
        fullest = max((len(arm.runs) for arm in arms.values()), default=0)
        short = [name for name, arm in arms.items() if 2 * len(arm.runs) < fullest]
        whole = {name: arm for name, arm in arms.items() if name not in short}
        if whole:
            seeds = sorted(set.intersection(*(set(arm.runs) for arm in whole.values())))
            if seeds:
                found.append(PoolRuns(pool, whole, seeds, study, short))
    return found


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or that there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}"


def with_interval(estimate: Estimate, form: str = "+.3f") -> str:
    """A number and its interval."""
    if not math.isfinite(estimate.low):
        return number(estimate.value, form)
    return f"{number(estimate.value, form)} ({number(estimate.low, form)} to {number(estimate.high, form)})"


def mean_where_known(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def detailed(pool: PoolRuns) -> list[str]:
    """The table of one pool, a row an arm."""
    baselines = [name for name in pool.study.baselines if name in pool.arms]
    heads = ["arm", "lr, steps", "test", "best", *(f"less {name}" for name in baselines)]
    heads += ["of the way", "of the way, best", "equal time", "choice", "kept", "AUC"]
    seeds = ", ".join(map(str, pool.seeds))
    lines = [f"**{pool.pool}** ({pool.metric.replace('_', ' ')}; seeds {seeds})", "", "| " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * len(heads))
    for arm in pool.arms.values():
        cells = [arm.name, chosen(arm, pool.seeds), number(mean_of(arm.last(pool.seeds)).value)]
        cells.append(number(mean_of(arm.best(pool.seeds)).value))
        cells += ["-" if name == arm.name else with_interval(less(arm, pool.arms[name], pool)) for name in baselines]
        cells += [
            share_of_way(arm, pool),
            share_of_way(arm, pool, best=True),
            at_equal_time(arm, pool),
            *choice_cells(arm, pool.seeds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if pool.short:
        lines += ["", f"Too few seeds yet: {', '.join(pool.short)}."]
    return [*lines, ""]


def chosen(arm: ArmRuns, seeds: Sequence[int]) -> str:
    """Learning rate and steps."""
    steps = sorted({arm.step(seed) for seed in seeds})
    return f"{arm.choice.lr:g}, {steps[0] if len(steps) == 1 else f'{steps[0]} to {steps[-1]}'}"


def less(arm: ArmRuns, other: ArmRuns, pool: PoolRuns) -> Estimate:
    """How much better an arm is than another, paired by seed."""
    pairs = zip(arm.signed(pool.seeds), other.signed(pool.seeds), strict=True)
    return mean_of([ours - theirs for ours, theirs in pairs])


def share_of_way(arm: ArmRuns, pool: PoolRuns, *, best: bool = False) -> str:
    """From the better baseline to the oracle; at the chosen steps, or at the ``best`` ones of each run."""
    oracle = pool.study.oracle
    baselines = [name for name in pool.study.baselines if name in pool.arms]
    if oracle not in pool.arms or not baselines or arm.name in (oracle, *baselines):
        return "-"
    values = [pool.arms[name].signed(pool.seeds, best=best) for name in baselines]
    ours, known = (pool.arms[name].signed(pool.seeds, best=best) for name in (arm.name, oracle))
    return with_interval(way(ours, values, known), ".2f")


def at_equal_time(arm: ArmRuns, pool: PoolRuns) -> str:
    """Less the better baseline, which trains on while the arm chooses."""
    name = pool.baseline()
    if name is None or not any(arm.runs[seed].selection_seconds for seed in pool.seeds):
        return "-"
    baseline, differences, is_within = pool.arms[name], [], True
    for seed, ours in zip(pool.seeds, arm.signed(pool.seeds), strict=True):
        run = baseline.runs[seed]
        value, is_on_curve = after_equal_time(run, baseline.step(seed), arm.runs[seed].selection_seconds)
        differences.append(ours - signed(value, run.metric))
        is_within = is_within and is_on_curve
    return ("" if is_within else "> ") + with_interval(mean_of(differences))


def choice_cells(arm: ArmRuns, seeds: Sequence[int]) -> list[str]:
    """What the choice has cost, what it has kept, and the AUC of its scores."""
    runs = [arm.runs[seed] for seed in seeds]
    seconds = float(np.mean([run.selection_seconds for run in runs]))
    steps = float(np.mean([run.selection_seconds / run.step_seconds for run in runs]))
    rows, share = (mean_where_known([getattr(run, name) for run in runs]) for name in ("rows", "share"))
    cost = f"{seconds:.1f} s, {steps:.0f}" if seconds else "-"
    kept = "-" if rows is None else f"{rows:.0f}" + ("" if share is None else f" ({100 * share:.0f} %)")
    return [cost, kept, number(mean_where_known([run.auc for run in runs]), ".2f")]


def overview(pools: Sequence[PoolRuns]) -> list[str]:
    """Means on ``test``, a row a pool, a column an arm."""
    names = list(dict.fromkeys(name for pool in pools for name in pool.arms))
    lines = ["| pool | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for pool in pools:
        means = [
            number(mean_of(pool.arms[name].last(pool.seeds)).value) if name in pool.arms else "-" for name in names
        ]
        lines.append(f"| {pool.pool} | " + " | ".join(means) + " |")
    return [*lines, ""]


def report(results: Path) -> tuple[str, str]:
    """The study's name, and its tables."""
    plan = json.loads(results.with_name("study.json").read_text(encoding="utf-8"))
    study = STUDIES[plan["study"]]
    trials = [trial for key, trial in read_trials(results).items() if key.study == plan["study"]]
    pools = gather(trials, study, most=plan["steps"], tuning=plan["tuning_seeds"])
    lines = overview(pools)
    if len(pools) <= DETAILED:
        for pool in pools:
            lines += detailed(pool)
    lines += [EXPLANATION, ""]
    finished = {(trial.key.pool, trial.key.arm) for trial in trials}
    failures = [line for line in read_failures(results) if (line["pool"], line["arm"]) not in finished]
    lines += not_there("Not run", plan["left_out"]) + not_there("Failed", failures)
    return plan["study"], "\n".join(lines)


def not_there(title: str, absent: Sequence[Mapping[str, str]]) -> list[str]:
    """Arms that no table has, with the pools and the reason."""
    pools: dict[tuple[str, str], list[str]] = {}
    for line in absent:
        pools.setdefault((line["arm"], line["reason"]), []).append(line["pool"])
    parts = [f"{arm} ({', '.join(dict.fromkeys(names))}): {reason}" for (arm, reason), names in pools.items()]
    return [f"{title}: {'; '.join(parts)}.", ""] if parts else []


def put_into(page: Path, study: str, text: str) -> None:
    """The tables between the study's two lines of a page.

    Raises:
        SystemExit: the page has no such lines.
    """
    start, end = f"<!-- study {study} -->", f"<!-- end of study {study} -->"
    whole = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(whole):
        raise SystemExit(f"{page} has no lines {start} and {end}")
    page.write_text(pattern.sub(lambda _: f"{start}\n\n{text}\n{end}", whole), encoding="utf-8")


def main() -> None:
    """Print, or write into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE")
    options = parser.parse_args()
    study, text = report(options.results)
    if options.into is None:
        print(text)
    else:
        put_into(options.into, study, text)


if __name__ == "__main__":
    main()
