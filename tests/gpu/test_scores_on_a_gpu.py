"""A pass over the pool on a GPU: samples in a batch and alone, and what a step waits for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.runs import go, run_tree
from tests.steps import take_step
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run


def scored(kind: str, folder: Path, models: Path, dtype: str, batch_size: int | str) -> dict[str, np.ndarray]:
    """Raw scores of the whole pool after two deterministic steps."""
    name = f"by-{batch_size}"
    tree = run_tree(
        kind, folder, models, name, model={"dtype": dtype}, scoring={"batch_size": batch_size}, train={"max_steps": 9}
    )
    tree["run"]["deterministic"] = True
    table = pq.read_table(go(tree).record.folder / "scores" / "pass-000.parquet")
    return {column: table[column].to_numpy() for column in ("loss", "grad_norm", "delta_loss", "convergence")}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_scores_in_a_batch_are_those_alone(tmp_path: Path, models_dir: Path, kind: str) -> None:
    together, alone = (scored(kind, tmp_path, models_dir, "fp32", size) for size in (8, 1))
    for column, values in alone.items():
        np.testing.assert_allclose(together[column], values, rtol=2e-3, atol=2e-5, err_msg=column)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_scores_in_a_batch_in_bf16(tmp_path: Path, models_dir: Path, kind: str) -> None:
    """Norms within what the pass itself takes for equal, for nearly all samples; the size found by measuring memory."""
    together, alone = (scored(kind, tmp_path, models_dir, "bf16", size) for size in ("auto", 1))
    off = np.abs(together["grad_norm"] / alone["grad_norm"] - 1)
    assert np.mean(off < 12 * torch.finfo(torch.bfloat16).eps) > 0.9
    assert np.corrcoef(together["grad_norm"], alone["grad_norm"])[0, 1] > 0.99


def waits(tree: dict[str, Any]) -> list[str]:
    """Where the host waited for the GPU in the third step of a run."""
    run = build_run(preflight.check(parse_config(tree)))
    for _ in range(2):
        take_step(run)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize(("kind", "by_forward"), [("bert", 1), ("llama", 3)])
def test_a_step_waits_once_beside_its_forwards(tmp_path: Path, models_dir: Path, kind: str, by_forward: int) -> None:
    """The forwards look at masks and count targets; the norm is read once a step."""
    off = {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}, "scoring": {"refresh": "none"}}
    for parts in (1, 4):
        tree = run_tree(kind, tmp_path, models_dir, f"run{parts}", train={"micro_batch_size": 12 // parts}, **off)
        found = waits(tree)
        assert len(found) <= 1 + parts * by_forward, found


def test_no_wait_comes_with_an_event(tmp_path: Path, models_dir: Path) -> None:
    """Moments that were taken out and put back do not make the optimizer look at its counts."""
    tree = run_tree("bert", tmp_path, models_dir, "run", sensitivity={"window": 1})
    run = build_run(preflight.check(parse_config(tree)))
    while run.step < 5:  # past the first event
        take_step(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    where = [w.filename for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert not [name for name in where if "/optim/" in name], where
