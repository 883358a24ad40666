#!/usr/bin/env python3
"""Is advice right? Verdicts on settings, beside what the arms of a study have come to there.

    python benchmarks/studies/judge.py OUT/results.jsonl --settings DIR --advice DIR [--pilot heads|adapters]
        [--rows N] [section.key=value ...]

``OUT/results.jsonl`` is of study ``settings`` (run.py), ``--settings`` the folder of settings.py with the same seeds.
Advice is asked for on every setting and seed that was run, and kept below ``--advice``: started again, the command goes
on with what is missing. A verdict names an arm: ``query`` ours, ``query alone`` the query's rows alone, ``even``
uniform draws, of the query, too, unless advice leaves it out.

Following it is *right* on a setting if, in the mean over the seeds, the arms that it names are not worse than the best
of uniform, uniform+q, query and ours by more than half of the width of that difference's interval (bootstrap over
seeds, 95 %). And it has a price: what it gains or loses against uniform draws. Beside it stand those who name one arm
always. Arms that were not run are out of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.fair import read_trials  # noqa: E402
from benchmarks.studies.plans import STUDIES  # noqa: E402
from benchmarks.studies.tables import PoolRuns, gather, number, with_interval  # noqa: E402
from tsqlora_scale.common.code_version import SOURCE  # noqa: E402
from tsqlora_scale.comparison.estimates import Estimate, mean_of  # noqa: E402

#: The arms that advice is about.
ARMS = ("uniform", "uniform+q", "query", "ours")
#: What may be lost against uniform draws.
LOSS = -0.005


@dataclass(frozen=True)
class Judged:
    """Advice on a setting.

    Attributes:
        named: the arm that it names, by seed.
        best: the arm with the best mean over the seeds.
        behind: the best arm less what was named.
        gain: what was named less uniform draws.
    """

    setting: str
    named: dict[int, str]
    best: str
    behind: Estimate
    gain: Estimate

    @property
    def is_right(self) -> bool:
        """See the module. With one seed there is no interval, and nothing may be lacking."""
        width = self.behind.high - self.behind.low
        return self.behind.value <= (width / 2 if np.isfinite(width) else 0.0) + 1e-12

    @property
    def is_dear(self) -> bool:
        """Whether following it has cost more than may be lost."""
        return self.gain.value < LOSS - 1e-12


def arm_of(advice: dict[str, Any]) -> str:
    """The arm that advice names."""
    if advice["verdict"] == "query" and not advice["trains on query"]:
        return "ours without q"  # which no study runs
    evenly = "uniform+q" if advice["trains on query"] else "uniform"
    return {"query": "ours", "query alone": "query"}.get(advice["verdict"], evenly)


def judge(pool: PoolRuns, named: dict[int, str]) -> Judged | None:
    """Of a setting, by the arms that are named for its seeds; None where one of them or uniform draws were not run."""
    seeds = [seed for seed in pool.seeds if seed in named]
    named = {seed: named[seed] for seed in seeds}
    there = [name for name in ARMS if name in pool.arms]
    if not seeds or "uniform" not in there or not set(named.values()) <= set(there):
        return None
    values = {name: dict(zip(seeds, pool.arms[name].signed(seeds), strict=True)) for name in there}
    best = max(there, key=lambda name: float(np.mean(list(values[name].values()))))
    followed = [values[named[seed]][seed] for seed in seeds]
    behind = mean_of([values[best][seed] - ours for seed, ours in zip(seeds, followed, strict=True)])
    gain = mean_of([ours - values["uniform"][seed] for seed, ours in zip(seeds, followed, strict=True)])
    return Judged(pool.pool, named, best, behind, gain)


def ask(setting: Path, out: Path, *, pilot: str, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The advice on a setting; what ``out`` has kept of it, if it has: of the same code."""
    out = out / "-".join([pilot, str(rows), SOURCE, *(f"{crc32(each.encode()):08x}" for each in overrides)])
    file = out / setting.parent.name / setting.name / "advice" / "advice.json"
    if not file.exists():
        from tsqlora_scale.api import advise
        from tsqlora_scale.config.load import load_config

        place = [f"run.output_dir={out / setting.parent.name}", f"run.name={setting.name}"]
        advise(load_config(setting / "config.yaml", [*place, *overrides]), pilot=pilot, rows=rows)  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def table(judged: Sequence[Judged], absent: Sequence[str]) -> str:
    """A row a setting, and how often advice was right."""
    lines = ["| setting | advice names | best | behind it | right | gain over uniform |", "|" + "---|" * 6]
    for one in judged:
        names = ", ".join(
            f"{name} ({list(one.named.values()).count(name)})" for name in dict.fromkeys(one.named.values())
        )
        right = "yes" if one.is_right else "no"
        cells = [one.setting, names, one.best, with_interval(one.behind), right, with_interval(one.gain)]
        lines.append("| " + " | ".join(cells) + " |")
    rights, dear = sum(one.is_right for one in judged), [one.setting for one in judged if one.is_dear]
    gains = [one.gain.value for one in judged]
    lines += ["", f"Right on {rights} of {len(judged)} settings ({100 * rights / max(len(judged), 1):.0f} %)."]
    mean, least = (number(float(of_all(gains)), "+.3f") for of_all in (np.mean, np.min)) if gains else ("-", "-")
    lines.append(f"Following it gains {mean} over uniform draws on average, and {least} at the least.")
    lines.append(f"More than {-100 * LOSS:g} points are lost on {len(dear)}{': ' if dear else ''}{', '.join(dear)}.")
    lines += [f"Not judged, as an arm was not run: {', '.join(absent)}."] if absent else []
    return "\n".join(lines) + "\n"


def constants_told(pools: Sequence[PoolRuns]) -> str:
    """How often whoever names one arm always would be right, and what that would gain: what advice has to beat."""
    lines = ["| who names always | right | gain over uniform | at the least |", "|" + "---|" * 4]
    for arm in ARMS:
        found = [judge(pool, dict.fromkeys(pool.seeds, arm)) for pool in pools]
        known = [one for one in found if one is not None]
        if len(known) < len(found) or not known:
            continue
        gains = [one.gain.value for one in known]
        rights = f"{sum(one.is_right for one in known)} of {len(known)}"
        lines.append(f"| {arm} | {rights} | {with_interval(mean_of(gains))} | {number(min(gains), '+.3f')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--settings", type=Path, required=True, metavar="DIR")
    parser.add_argument("--advice", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pilot", choices=("heads", "adapters"), default="heads")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("overrides", nargs="*", help="section.key=value for all settings")
    options = parser.parse_intermixed_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plan = json.loads(options.results.with_name("study.json").read_text(encoding="utf-8"))
    trials = list(read_trials(options.results).values())
    pools = gather(trials, STUDIES[plan["study"]], most=plan["steps"], tuning=plan["tuning_seeds"])
    judged, absent = [], []
    for pool in pools:
        named = {}
        for seed in pool.seeds:
            setting = options.settings / f"seed-{seed}" / pool.pool
            pilot = options.pilot if "uniform+q" in pool.arms else "heads"
            found = ask(setting, options.advice, pilot=pilot, rows=options.rows, overrides=options.overrides)
            named[seed] = arm_of(found)
            print(f"{setting.parent.name}/{setting.name}: {found['verdict']}", file=sys.stderr, flush=True)
        one = judge(pool, named)
        if one is None:
            absent.append(pool.pool)
        else:
            judged.append(one)
    print(table(judged, absent))
    print(constants_told([pool for pool in pools if pool.pool not in absent]))


if __name__ == "__main__":
    main()
