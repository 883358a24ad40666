"""When advice is right, what following it gains, and the command over kept and new advice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.studies import judge as judging
from benchmarks.studies.fair import read_trials
from benchmarks.studies.judge import arm_of, ask, judge, table
from benchmarks.studies.plans import STUDIES
from benchmarks.studies.pools import Maker, write_pool
from benchmarks.studies.settings import config_of, make_setting
from benchmarks.studies.tables import PoolRuns, gather
from tests.tiny import tiny_model
from tests.unit.studies.small_data import write_small_data
from tsqlora_scale.common.code_version import SOURCE

#: arm -> values of ``test`` with the seeds 0, 1, 2
MIXED = {
    "uniform": (0.50, 0.52, 0.54),
    "uniform+q": (0.55, 0.56, 0.57),
    "query": (0.66, 0.64, 0.62),
    "ours": (0.70, 0.76, 0.74),
}
PLAIN = {"uniform": (0.80, 0.81, 0.79), "quality": (0.9, 0.9, 0.9)}


def said(verdict: str, trains_on_query: bool = True) -> dict[str, Any]:
    """Advice."""
    return {"verdict": verdict, "trains on query": trains_on_query}


def write_results(folder: Path, pools: dict[str, dict[str, tuple[float, ...]]]) -> Path:
    """Runs of three seeds; the tuning seed's are as those of seed 0."""
    lines = []
    for pool, arms in pools.items():
        for arm, values in arms.items():
            for seed, value in zip((100, 0, 1, 2), (values[0], *values), strict=True):
                curve = {"25": {"tune": {"accuracy": value}, "test": {"accuracy": value}}}
                line = {"study": "settings", "pool": pool, "seed": seed, "arm": arm, "lr": 1e-3, "metric": "accuracy"}
                line |= {"curve": curve, "seconds": {"training": 9.0}, "extra_seconds": 0.0, "error": None}
                lines.append(json.dumps({**line, **dict.fromkeys(("rows", "share", "auc"))}))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan = {"study": "settings", "steps": 25, "tuning_seeds": [100], "left_out": []}
    (folder / "study.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder / "results.jsonl"


def runs_of(folder: Path, arms: dict[str, tuple[float, ...]]) -> PoolRuns:
    results = write_results(folder, {"sst2-mix-500": arms})
    (runs,) = gather(list(read_trials(results).values()), STUDIES["settings"], most=25, tuning=[100])
    return runs


@pytest.mark.parametrize(
    ("verdicts", "is_right", "behind", "gain"),
    [
        (["query"] * 3, True, 0.0, 0.213),
        (["query alone"] * 3, False, 0.093, 0.12),
        (["even"] * 3, False, 0.173, 0.04),
        (["query", "query", "even"], True, 0.057, 0.157),
    ],
)
def test_what_is_named_is_compared_with_the_best(
    verdicts: list[str], is_right: bool, behind: float, gain: float, tmp_path: Path
) -> None:
    found = judge(runs_of(tmp_path, MIXED), {seed: arm_of(said(verdict)) for seed, verdict in enumerate(verdicts)})
    assert found is not None
    assert (found.best, found.is_right, found.is_dear) == ("ours", is_right, False)
    assert found.behind.value == pytest.approx(behind, abs=1e-3)
    assert found.gain.value == pytest.approx(gain, abs=1e-3)


def test_a_loss_is_dear(tmp_path: Path) -> None:
    arms = MIXED | {"ours": (0.48, 0.52, 0.52)}
    found = judge(runs_of(tmp_path, arms), dict.fromkeys(range(3), "ours"))
    assert found is not None and found.is_dear and not found.is_right
    assert "More than 0.5 points are lost on 1: sst2-mix-500." in table([found], [])
    assert "Right on 0 of 1 settings (0 %)." in table([found], [])


def test_what_was_not_run_is_not_judged(tmp_path: Path) -> None:
    arms = {name: values for name, values in MIXED.items() if name != "ours"}
    runs = runs_of(tmp_path, arms)
    assert judge(runs, dict.fromkeys(range(3), "ours")) is None
    assert judge(runs, dict.fromkeys(range(3), "uniform")) is not None
    assert judge(runs, {}) is None


def test_even_draws_are_of_the_query_too_where_advice_says_so() -> None:
    cases = [("even", True), ("even", False), ("query", True), ("query alone", True), ("query", False)]
    assert [arm_of(said(*case)) for case in cases] == ["uniform+q", "uniform", "ours", "query", "ours without q"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_results(tmp_path, {"sst2-mix-500": MIXED, "sst2-clean-500": PLAIN})
    for seed, verdict in enumerate(["query", "query", "even"]):
        for setting, told in (("sst2-mix-500", verdict), ("sst2-clean-500", "even")):
            folder = tmp_path / "advice" / f"heads-2000-{SOURCE}" / f"seed-{seed}" / setting / "advice"
            folder.mkdir(parents=True)
            (folder / "advice.json").write_text(json.dumps(said(told, setting != "sst2-clean-500")), encoding="utf-8")
    command = ["judge.py", results, "--settings", tmp_path / "settings", "--advice", tmp_path / "advice"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    judging.main()
    out = capsys.readouterr().out
    assert "| sst2-mix-500 | ours (2), uniform+q (1) | ours | +0.057" in out
    assert "| sst2-clean-500 | uniform (3) | uniform | +0.000" in out
    assert "Right on 2 of 2 settings (100 %)." in out
    assert "| uniform | 1 of 2 | +0.000" in out, "who names that always"
    assert "\n| ours |" not in out, "which was not run everywhere"
    assert "gains +0.078 over uniform draws on average, and +0.000 at the least" in out


def test_advice_is_asked_for_once(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker(write_small_data(tmp_path / "data"), 0, 0.08)
    pool = make_setting(maker, "sst2-mix-500")
    setting = tmp_path / "seed-0" / pool.name
    write_pool(setting, pool, 0)
    config = config_of(setting, pool, str(tiny_model("bert", models_dir)), 0)
    (setting / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    found = ask(setting, tmp_path / "out", pilot="heads", rows=30, overrides=["train.batch_size=4"])
    assert found["verdict"] in ("query", "query alone", "even")
    assert (found["pool"], found["looked at"]) == (40, 30)
    monkeypatch.setattr("tsqlora_scale.api.advise", None)
    same = {"pilot": "heads", "rows": 30, "overrides": ["train.batch_size=4"]}
    assert ask(setting, tmp_path / "out", **same) == found  # type: ignore[arg-type]
    with pytest.raises(TypeError):  # of other pilots or rows it is asked for anew
        ask(setting, tmp_path / "out", **{**same, "rows": 20})  # type: ignore[arg-type]
