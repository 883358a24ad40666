"""What a GPU is told, as far as a CPU can hear it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.devices import ON_GPU, hide_gpus
from tests.runs import go, losses_of, result_of, run_tree
from tsqlora_scale.common import failures, quiet
from tsqlora_scale.engine import arithmetic
from tsqlora_scale.engine.arithmetic import TF32_EPS, set_arithmetic, unit_roundoff
from tsqlora_scale.engine.numerics import clip_gradients, rounded_norm
from tsqlora_scale.report.peak_memory import PeakMemory


@pytest.fixture
def arithmetic_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    set_arithmetic(deterministic=False, tf32=False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


@pytest.mark.usefixtures("arithmetic_stays")
def test_determinism_is_switched_on_and_off_again() -> None:
    set_arithmetic(deterministic=True, tf32=False)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention's kernels only obey the strict mode"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == arithmetic.CUBLAS_WORKSPACE
    set_arithmetic(deterministic=False, tf32=False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("arithmetic_stays")
def test_determinism_of_others_stays() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        set_arithmetic(deterministic=False, tf32=False)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("arithmetic_stays")
def test_a_deterministic_run_is_the_same_run(tmp_path: Path, models_dir: Path) -> None:
    """All that a run computes has deterministic kernels on a CPU, and they are those that it takes anyway."""
    tree = run_tree("bert", tmp_path, models_dir, "plain", train={"max_steps": 9})
    plain = go(tree).record.folder
    run = go(
        tree
        | {
            "run": tree["run"] | {"name": "deterministic", "deterministic": True},
            "model": tree["model"] | {"tf32": True},
        }
    )
    assert torch.are_deterministic_algorithms_enabled()
    assert losses_of(run.record.folder) == losses_of(plain)
    assert result_of(plain)["peak_memory_by_phase"] == {}
    assert result_of(plain)["peak_memory_bytes"][0] > 2**20


@pytest.mark.usefixtures("arithmetic_stays")
def test_products_in_tf32_are_known_to_be_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unit_roundoff(torch.float32) == torch.finfo(torch.float32).eps
    set_arithmetic(deterministic=False, tf32=True)
    assert unit_roundoff(torch.float32) == torch.finfo(torch.float32).eps, "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_arithmetic(deterministic=False, tf32=True)
    assert unit_roundoff(torch.float32) == TF32_EPS
    assert unit_roundoff(torch.bfloat16) == torch.finfo(torch.bfloat16).eps


def test_segments_grow_unless_somebody_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(quiet.sys, "platform", "linux")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    quiet.prepare_environment()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    quiet.prepare_environment()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    quiet.prepare_environment()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"


@pytest.mark.parametrize(
    ("backend", "code", "destroyed"), [("nccl", 0, True), ("nccl", 1, False), ("nccl", 130, False), ("gloo", 0, False)]
)
def test_groups_are_taken_down_only_after_success(
    monkeypatch: pytest.MonkeyPatch, backend: str, code: int, destroyed: bool
) -> None:
    """Taking an NCCL group down waits for ranks that are inside a collective, and after an error some are."""
    calls: list[object] = []
    group = torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_backend", lambda: backend)
    monkeypatch.setattr(group, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(failures, "leave", calls.append)
    failures.leave_group(code)
    assert calls == (["destroyed", code] if destroyed else [code])


class Meter:
    """Memory that goes up and down as a test says."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, size: int) -> None:
        self.now = size
        self.peak = max(self.peak, size)

    def reset(self) -> None:
        self.peak = self.now

    def measured(self) -> PeakMemory:
        return PeakMemory(measured=(lambda: self.peak, self.reset))


def test_every_phase_has_its_own_peak() -> None:
    meter = Meter()
    memory = meter.measured()
    with memory.phase("load"):
        meter.hold(90)
        meter.hold(10)
    with memory.phase("training"):
        meter.hold(30)
        meter.hold(12)
        with memory.phase("checkpointing"):
            meter.hold(50)
            meter.hold(12)
        meter.hold(20)
    with contextlib.suppress(KeyError), memory.phase("scoring"):
        meter.hold(70)
        raise KeyError
    meter.hold(12)
    with memory.phase("training"):
        meter.hold(25)
    assert memory.bytes == {"load": 90, "training": 50, "checkpointing": 50, "scoring": 70}
    assert memory.highest == 90
    meter.hold(95)
    meter.hold(0)
    assert memory.highest == 95, "also between phases"


def test_a_cpu_has_one_peak() -> None:
    memory = PeakMemory(torch.device("cpu"))
    with memory.phase("load"):
        pass
    assert memory.bytes == {}
    assert memory.highest > 2**20


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), max_size=4), st.floats(1e-3, 1e3))
def test_clipping_is_a_product_by_one_number(rows: list[list[float]], most: float) -> None:
    """To the bit what a loop over the tensors gives."""
    params = [torch.nn.Parameter(torch.zeros(len(row))) for row in rows] + [torch.nn.Parameter(torch.zeros(1))]
    for param, row in zip(params, rows, strict=False):
        param.grad = torch.tensor(row)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    scale = 1.0 / ((rounded_norm(norm) + 1e-6) / most).clamp(min=1.0)
    expected = [torch.tensor(row) * scale for row in rows]
    clip_gradients(params, norm, most)
    assert all(torch.equal(p.grad, e) for p, e in zip(params, expected, strict=False) if p.grad is not None)
    assert params[-1].grad is None


@pytest.mark.parametrize(
    ("asked", "hidden"),
    [(["tests/gpu"], False), (["tests/gpu/test_runs.py::test_x"], False), (["tests"], True), ([], True),
     (["tests/gpu", "tests/unit"], True)],
)  # fmt: skip
def test_gpus_are_hidden_from_tests_over_gloo(monkeypatch: pytest.MonkeyPatch, asked: list[str], hidden: bool) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    hide_gpus([str(ON_GPU.parent.parent / one) for one in asked])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")
