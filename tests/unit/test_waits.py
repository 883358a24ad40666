"""How often a step would make the host wait for a GPU, counted on a CPU: reads of values, and searches for places."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs import go, losses_of, ranks_of, run_tree
from tests.steps import take_step
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.base_engine import adamw
from tsqlora_scale.engine.ddp import DdpEngine
from tsqlora_scale.engine.transfers import HostCopy, to_device
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.tasks.batch import IGNORED
from tsqlora_scale.tasks.losses import token_losses

#: Operations whose result the host has to know before it can go on.
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every operation."""
        if func in WAITING:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer that a GPU has."""
    monkeypatch.setattr(DdpEngine, "_fuses", True)


def waits_of_a_step(tree: dict[str, Any]) -> int:
    """Of one in the middle of a run, without what the transformers library looks at: whether a mask is all ones."""
    run = build_run(preflight.check(parse_config(tree)))
    take_step(run)
    with Waits() as waits:
        take_step(run)
    return waits.found.total()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_step_waits_once_beside_its_forwards(tmp_path: Path, models_dir: Path, kind: str, fused: None) -> None:
    """A micro-batch more adds what the model's own forward looks at, and of tokens how many there are."""
    off = {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}, "scoring": {"refresh": "none"}}
    trees = [
        run_tree(kind, tmp_path, models_dir, f"run{parts}", train={"micro_batch_size": 12 // parts}, **off)
        for parts in (1, 2, 4)
    ]
    one, two, four = map(waits_of_a_step, trees)
    by_forward = two - one
    assert four - two == 2 * by_forward
    assert one - by_forward == 1, "the gradient's norm"
    assert by_forward == {"bert": 1, "llama": 3}[kind], "whether masks are all ones, and how many targets there are"


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
