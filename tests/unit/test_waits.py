"""How often a step would make the host wait for a GPU, counted on a CPU: reads of values, and searches for places."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.runs import go, losses_of, ranks_of, run_tree
from tests.steps import take_step
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.base_engine import adamw
from tsqlora_scale.engine.ddp import DdpEngine
from tsqlora_scale.engine.transfers import HostCopy, to_device
from tsqlora_scale.quality.online.online_scorer import OnlineScorer
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.tasks import Task, packing
from tsqlora_scale.tasks.batch import IGNORED
from tsqlora_scale.tasks.losses import token_losses

#: Operations whose result the host has to know before it can go on.
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
LIBRARIES = ("/tsqlora_scale/", "/transformers/", "/peft/", "/accelerate/", "/torch/nn/", "/torch/optim/")


class Waits(TorchDispatchMode):
    """Counts them, and copies to the host by ``cpu()``, by the line that asks for them.

    What the host does with tensors of its own, as it makes a batch and looks at a copy, is left out.

    Attributes:
        found: by line.
        copies: reads of what was copied to the host; one that comes after a wait is none itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.copies = 0
        self._patches = ExitStack()

    def __enter__(self) -> Waits:
        batch, tensors, take, cpu = Task.batch, HostCopy.tensors, OnlineScorer.take, torch.Tensor.cpu

        def copied(copy: HostCopy) -> list[torch.Tensor]:
            self.copies += 1
            return tensors(copy)

        def counted(tensor: torch.Tensor) -> torch.Tensor:
            self.found[line()] += 1
            return cpu(tensor)

        def apart(call: Any) -> Any:
            def alone(*args: Any, **kwargs: Any) -> Any:
                with _disable_current_modes():
                    return call(*args, **kwargs)

            return alone

        for owner, name, other in (
            (Task, "batch", apart(batch)),
            (OnlineScorer, "take", apart(take)),
            (HostCopy, "tensors", copied),
            (torch.Tensor, "cpu", counted),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, other))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every operation."""
        if func in WAITING:
            self.found[line()] += 1
        return func(*args, **(kwargs or {}))


def line() -> str:
    """The innermost line of a package that is running: its file, its function and what it says."""
    frames = [one for one in traceback.extract_stack() if any(part in one.filename for part in LIBRARIES)]
    return f"{Path(frames[-1].filename).name}, {frames[-1].name}: {frames[-1].line}" if frames else "a test"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer that a GPU has."""
    monkeypatch.setattr(DdpEngine, "_fuses", True)


OFF: dict[str, Any] = {
    "allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}, "scoring": {"refresh": "none"}
}  # fmt: skip
ONLINE: dict[str, Any] = {"scoring": {"source": "online", "refresh": "none"}, "sampling": {"keep_fraction": 1.0}}


@pytest.mark.parametrize(
    ("kind", "sections", "parts"),
    [("bert", OFF, 1), ("bert", OFF, 3), ("bart", OFF, 3), ("t5", OFF, 2), ("llama", {}, 3), ("llama", ONLINE, 2)],
)
def test_a_step_waits_once(
    tmp_path: Path, models_dir: Path, kind: str, sections: dict[str, Any], parts: int, fused: None
) -> None:
    """Whatever the accumulation, and whoever listens."""
    tree = run_tree(kind, tmp_path, models_dir, "run", train={"micro_batch_size": 12 // parts}, **sections)
    run = build_run(preflight.check(parse_config(tree)))
    take_step(run)
    with Waits() as waits:
        take_step(run)
    assert waits.found == {"ddp.py, step: found = float(norm)  # the step's one wait for a GPU": 1}


def test_a_packed_step_waits_once(
    tmp_path: Path, models_dir: Path, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where samples lie is known on the host."""
    monkeypatch.setattr(packing, "GAIN", 1.0)
    train = {"micro_batch_size": 6, "packing": True}
    run = build_run(preflight.check(parse_config(run_tree("gpt2", tmp_path, models_dir, "run", train=train, **ONLINE))))
    take_step(run)
    with Waits() as waits:
        take_step(run)
    assert waits.found.total() == 1, waits.found


@pytest.mark.parametrize(("kind", "delta"), [("bert", "first_order"), ("bart", "exact"), ("llama", "exact")])
def test_a_scoring_batch_waits_once(tmp_path: Path, models_dir: Path, kind: str, delta: str) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run", scoring={"delta_loss": delta, "batch_size": 8})
    run = build_run(preflight.check(parse_config(tree)))
    selector: Any = run.selector
    measurer, rows = selector.scorer._measurer, np.arange(32)
    with measurer.on(run.engine.module):
        measurer.measure(rows, kind=delta)  # which decides on batches
        with Waits() as waits:
            measurer.measure(rows, kind=delta)
    assert waits.copies == 4
    assert [name.split(":")[0] for name in waits.found] == ["measurer.py, _on_any_rank"], "once a shard"
    assert waits.found.total() == 1


def test_the_fused_optimizer_is_the_same_method(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through two rank events, in which its moments and its count are taken out and put back."""
    plain = go(run_tree("bert", tmp_path, models_dir, "plain")).record.folder
    monkeypatch.setattr(DdpEngine, "_fuses", True)
    run = go(run_tree("bert", tmp_path, models_dir, "fused"))
    assert run.engine._optimizer.optimizer.defaults["fused"] is True  # type: ignore[attr-defined]
    assert run.engine.gather().optimizer_steps == 13
    assert losses_of(run.record.folder) == pytest.approx(losses_of(plain), rel=1e-4)
    assert ranks_of(run.record.folder) == ranks_of(plain)


def test_only_a_gpus_optimizer_is_fused(tmp_path: Path, models_dir: Path) -> None:
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    params = [torch.nn.Parameter(torch.ones(2))]
    assert adamw(params, config.train).defaults["fused"] is None
    assert adamw(params, config.train, fused=True).defaults["fused"] is True


def test_token_losses_look_for_the_targets_once() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    targets[0, :2] = targets[2] = IGNORED
    with Waits() as waits:
        sums, terms = token_losses(logits, targets)
    assert waits.found.total() == 1
    for row in range(3):
        kept = [t for t in range(5) if targets[row, t] != IGNORED]
        expected = sum(
            (torch.nn.functional.cross_entropy(logits[row, t], targets[row, t]) for t in kept), torch.tensor(0.0)
        )
        torch.testing.assert_close(sums[row], expected)
        assert terms[row] == len(kept)


def test_copies_to_the_host_are_read_as_they_are() -> None:
    told = HostCopy(torch.tensor([1.5, float("nan")]), torch.tensor(3.0, dtype=torch.float64))
    (first, second), (third,) = told.read()
    assert (first, third) == (1.5, 3.0) and second != second
    source = torch.arange(3)
    assert to_device(source, torch.device("cpu")).tolist() == [0, 1, 2]
