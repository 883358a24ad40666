"""What a run of a study is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.fair import TrialKey
from benchmarks.studies.jobs import Job
from benchmarks.studies.pools import Maker, write_pool
from benchmarks.studies.trial import TrialSettings, configured, read_curve
from tests.unit.studies.small_data import write_small_data

BOTH = {"tune": "tune.jsonl", "test": "test.jsonl"}


@pytest.mark.parametrize(
    ("tuning", "seed", "files"), [(None, 0, BOTH), ([100], 0, "test.jsonl"), ([100], 100, "tune.jsonl")]
)
def test_a_lean_study_judges_on_the_half_that_counts(
    tmp_path: Path, tuning: list[int] | None, seed: int, files: object
) -> None:
    pool = Maker(write_small_data(tmp_path / "data"), seed, 0.02).make("mixed")
    write_pool(tmp_path / f"seed-{seed}" / "mixed", pool, seed)
    settings = TrialSettings(tmp_path, tmp_path / "out", "model", steps=4, baseline_steps=6, every=2, tuning=tuning)
    config, _ = configured(settings, Job(TrialKey("query", "mixed", seed, "uniform+q", 1e-3)))
    assert config.task.dataset.dev_file == files


def test_a_curve_of_one_set_or_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "eval": {"accuracy": 0.7, "loss": 0.6}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_curve(path, "tune") == {"2": {"tune": {"accuracy": 0.7, "loss": 0.6}}}
    path.write_text(json.dumps({"step": 2, "eval": {"tune/accuracy": 0.7, "test/accuracy": 0.6}}), encoding="utf-8")
    assert read_curve(path) == {"2": {"tune": {"accuracy": 0.7}, "test": {"accuracy": 0.6}}}
