"""One run of a study in this process, by the package's own ``train``; what its folder says, and then it is gone."""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.arms import ARMS, Site, Suspicion, read_audit
from benchmarks.studies.fair import auc
from benchmarks.studies.jobs import Job
from benchmarks.studies.pools import read_rows
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config

HERE = Path(__file__).parent


@dataclass(frozen=True)
class TrialSettings:
    """What all runs of a study share.

    Attributes:
        pools: the folder that pools.py (or settings.py) has written.
        out: of the study.
        steps: of a run; baselines go on to ``baseline_steps``.
        every: steps between evaluations.
        overrides: for all runs.
        tuning: seeds whose runs are judged on ``tune`` alone, and all others on ``test`` alone; None: all on both.
    """

    pools: Path
    out: Path
    model: str
    steps: int
    baseline_steps: int
    every: int
    overrides: Sequence[str] = ()
    tuning: Sequence[int] | None = None

    def folder(self, pool: str, seed: int) -> Path:
        """Of a pool."""
        return self.pools / f"seed-{seed}" / pool

    def judged_on(self, seed: int) -> str | None:
        """The one half that a run of a seed is judged on; None: both."""
        return None if self.tuning is None else "tune" if seed in self.tuning else "test"


def configured(settings: TrialSettings, job: Job) -> tuple[Config, dict[str, Any]]:
    """The config of a run, whose files are written, and ``meta.json`` of its pool.

    Raises:
        UserError: the package refuses it. Unavailable: the pool lacks something.
    """
    key, arm = job.key, ARMS[job.key.arm]
    pool = settings.folder(key.pool, key.seed)
    meta = json.loads((pool / "meta.json").read_text(encoding="utf-8"))
    name = re.sub(r"\W+", "-", f"{key.study}-{key.pool}-{key.seed}-{key.arm}-{key.lr:g}")
    site = Site(pool, settings.out / "inputs" / name, meta, key.seed, job.size)
    metrics = [meta["metric"], *(["loss"] if meta["metric"] != "loss" else [])]
    overrides = [
        f"model.name_or_path={settings.model}",
        f"task.dataset.path={pool}",
        f"task.metrics=[{','.join(metrics)}]",
        f"train.max_steps={settings.baseline_steps if arm.is_baseline else settings.steps}",
        f"train.eval_every={settings.every}",
        f"train.lr={key.lr!r}",
        f"run.seed={key.seed}",
        f"run.output_dir={settings.out / 'runs'}",
        f"run.name={name}",
    ]
    judged_on = settings.judged_on(key.seed)
    if judged_on is not None:
        overrides += [f"task.dataset.dev_file={judged_on}.jsonl", "train.eval_on_start=false"]
    base = HERE / ("summaries.yaml" if meta["task"] == "summaries" else "classes.yaml")
    return load_config(base, [*overrides, *arm.prepare(site), *settings.overrides]), meta


def run_trial(settings: TrialSettings, job: Job) -> dict[str, Any]:
    """Train, and what is to be known of it; a line of ``results.jsonl``.

    Raises:
        UserError: as the package's ``train``.
    """
    from tsqlora_scale.api import train

    start = time.perf_counter()
    config, meta = configured(settings, job)
    folder = config.run_dir
    try:
        result = train(config, overwrite=True)
        pool = settings.folder(job.key.pool, job.key.seed)
        by_audit = "audit" in ARMS[job.key.arm].needs
        return {
            **asdict(job.key),
            "metric": meta["metric"],
            "curve": read_curve(folder / "metrics.jsonl", settings.judged_on(job.key.seed)),
            "seconds": {**result.seconds, "wall": round(time.perf_counter() - start, 3)},
            "extra_seconds": audit_seconds(pool) if by_audit else 0.0,
            **(judged_audit(pool) if by_audit else judged_choice(folder / "scores", pool / "truth.jsonl")),
            "size": job.size,
            "device": device_name(),
            "error": None,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(settings.out / "inputs" / config.run.name, ignore_errors=True)
        let_go()


def read_curve(path: Path, alone: str | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Step -> held-out set -> metric -> value, from the lines of a run.

    Args:
        alone: the one set of a run in whose lines it has no name.
    """
    curve: dict[str, dict[str, dict[str, float]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for name, value in line.get("eval", {}).items():
            rows, _, metric = name.rpartition("/")
            curve.setdefault(str(line["step"]), {}).setdefault(alone or rows, {})[metric] = value
    return curve


def judged_choice(scores: Path, truth: Path) -> dict[str, Any]:
    """How good a selector's choice was: ``rows`` of the pool that it kept, the ``share`` of good ones among them, as
    rows and as they are drawn (``drawn_share``), and the ``auc`` of the scores. None of a run that has no scores.

    Good is what is on target or, in a pool that is all on target, what is rightly labelled. Rows of the query, which a
    choice has beside the pool's, do not count.
    """
    found: dict[str, Any] = dict.fromkeys(("rows", "share", "drawn_share", "auc"))
    passes = sorted(scores.glob("pass-*.parquet"))
    if not passes:
        return found
    import pyarrow.parquet as pq

    known = {row["id"]: row for row in read_rows(truth)}
    mixed = not all(row["on_target"] for row in known.values())
    table = pq.read_table(passes[-1], columns=["sample_id", "quality", "probability", "selected"])
    ids = table.column("sample_id").to_pylist()
    at = np.array([i for i, name in enumerate(ids) if name in known], dtype=np.int64)
    good = np.array([known[ids[i]]["on_target"] if mixed else not known[ids[i]]["wrong"] for i in at], dtype=bool)
    quality, probability, selected = (
        table.column(name).to_numpy()[at] for name in ("quality", "probability", "selected")
    )
    kept = selected.astype(bool)
    mass = np.where(kept, probability, 0.0)
    found["rows"] = int(kept.sum())
    if kept.any():
        found["share"] = float(good[kept].mean())
    if mass.sum() > 0:
        found["drawn_share"] = float(mass[good].sum() / mass.sum())
    if np.isfinite(quality).all():
        found["auc"] = auc(quality, good)
    return found


def judged_audit(pool: Path) -> dict[str, Any]:
    """The same of an audit: what would be kept if its suspects were dropped, whatever is done to them."""
    audit = read_audit(pool)
    truth = read_rows(pool / "truth.jsonl")
    suspicion = np.array([audit.get(row["id"], Suspicion()).probability for row in truth])
    good = np.array([not row["wrong"] for row in truth])
    kept = suspicion <= 0.5
    share = float(good[kept].mean()) if kept.any() else None
    return {"rows": int(kept.sum()), "share": share, "drawn_share": share, "auc": auc(-suspicion, good)}


def audit_seconds(pool: Path) -> float:
    """What the audit of a pool has cost, where that is written down."""
    path = pool / "audit_seconds.txt"
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def device_name() -> str:
    """Of what the run was on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def let_go() -> None:
    """Of what a run has held: its modules are in cycles, and the allocator of a GPU that others share keeps blocks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(job: Job, reason: str) -> Mapping[str, Any]:
    """The line of a run that came to nothing."""
    return {**asdict(job.key), "error": reason}
