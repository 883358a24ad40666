"""Killed at any point, a run resumes from its last complete checkpoint as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killer import Point
from tests.faults.points import FIRST_DEATH, FIRST_LIFE, SECOND_LIFE, WITH_A_PROXY
from tests.runs import read_lines, run_tree, write_config
from tests.tiny import tiny_model
from tests.warm import warm

ROOT = Path(__file__).resolve().parents[2]
LIVES = Path(__file__).with_name("lives.py")


def chosen(crossings: dict[str, int], points: list[Point]) -> list[tuple[str, int]]:
    """The first and the last crossing of each point."""
    names = [point.name for point in points]
    missing = [point for point in names if not crossings.get(point)]
    assert not missing, f"never crossed: {missing}, but {sorted(crossings)}"
    return sorted({(point, n) for point in names for n in (1, crossings[point])})


def live(config: Path, out: Path, cases: dict[str, list[tuple[str, int]]]) -> None:
    """Run the cases of a plan."""
    plan = out.with_suffix(".json")
    plan.write_text(json.dumps({"config": str(config), "out": str(out), "cases": cases}))
    done = warm().run([str(LIVES), str(plan)], timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def timeless(value: Any) -> Any:
    """Without what a clock or this process says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return value


#: They hold places, or digests of files with times.
NOT_COMPARED = {"manifest.json", "config.yaml"}
TIMES = {
    "seconds", "wall_seconds", "samples_per_second", "share_of_run", "peak_memory_bytes", "adapter", "output_dir",
}  # fmt: skip


def left_behind(folder: Path) -> dict[str, Any]:
    """All that a run leaves: every file, those with times without them."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*/*") if p.is_file()):  # not what lies beside the run folders
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            found[name] = [timeless(line) for line in read_lines(path)]
        elif path.name in ("result.json", "state.json"):
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = None if path.name in NOT_COMPARED else path.read_bytes()
    return found


def draws(folder: Path) -> dict[tuple[str, int], list[int]]:
    """The samples of every run's every step, asserting that every life drew the same."""
    found: dict[tuple[str, int], list[int]] = {}
    for line in read_lines(folder / "draws.jsonl"):
        assert found.setdefault((line["run"], line["step"]), line["indices"]) == line["indices"], line
    return found


def as_if_nothing_had_happened(out: Path, names: list[str], steps: int) -> None:
    """The runs of all names have left the same as the run ``whole``."""
    expected, expected_draws = left_behind(out / "whole"), draws(out / "whole")
    assert [step for run, step in sorted(expected_draws) if run == "run"] == list(range(steps))
    wrong: dict[str, list[str]] = {}
    for name in names:
        found = left_behind(out / name)
        differs = sorted(file for file in {*expected, *found} if found.get(file, "-") != expected.get(file, "-"))
        if draws(out / name) != expected_draws:
            differs.append("draws")
        if differs:
            wrong[name] = differs
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_any_point(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree(
        "bert", tmp_path, models_dir, "run",
        scoring={"shard_size": 12},
        train={"checkpoint_every": 3, "checkpoint_keep": 2, "eval_every": 4, "micro_batch_size": 6},
    )  # fmt: skip
    config, out = write_config(tmp_path / "config.yaml", tree), tmp_path / "lives"
    live(config, out, {"whole": [], "once": [FIRST_DEATH]})
    first, second = (
        json.loads((out / name).read_text()) for name in ("whole/crossings-0.json", "once/crossings-1.json")
    )
    cases = {f"{point} {n}": [(point, n)] for point, n in chosen(first, FIRST_LIFE)}
    cases |= {f"again {point} {n}": [FIRST_DEATH, (point, n)] for point, n in chosen(second, SECOND_LIFE)}
    assert len(cases) >= 60
    cases = {name.replace(": ", "-").replace(" ", "-"): kills for name, kills in cases.items()}
    if os.environ.get("CI") == "true":  # every seventh, first and last crossings in turn: all of them take minutes
        cases = dict(list(cases.items())[::7])
    live(config, out, cases)
    as_if_nothing_had_happened(out, ["once", *cases], 13)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_with_a_proxy(tmp_path: Path, models_dir: Path) -> None:
    """In the proxy's warm-up, in its pass, between the two models, and before the first step of the second."""
    tree = run_tree(
        "bert", tmp_path, models_dir, "run",
        scoring={"shard_size": 12, "proxy_model": str(tiny_model("deberta", models_dir)), "refresh": "none"},
        train={"max_steps": 9, "checkpoint_every": 4, "eval_every": 3, "micro_batch_size": 6},
    )  # fmt: skip
    config, out = write_config(tmp_path / "config.yaml", tree), tmp_path / "lives"
    cases = {f"{point.name} {n}".replace(": ", "-").replace(" ", "-"): [(point.name, n)] for point, n in WITH_A_PROXY}
    live(config, out, {"whole": [], **cases})
    as_if_nothing_had_happened(out, list(cases), 9)
