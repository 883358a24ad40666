"""The engine in one process: moments, step counts and trajectories survive a rebuild."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.tiny import tiny_model
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.config.schema import AdapterConfig, ModelConfig, TrainConfig
from tsqlora_scale.engine.engine import Engine, start_engine
from tsqlora_scale.engine.start import start_accelerator
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.model.adapters.lora import LoraAdapter, lora_layers
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.base_model import load_base, skeleton
from tsqlora_scale.model.linear_layers import heads_of, resolve_targets
from tsqlora_scale.run.checkpoint import read_checkpoint, write_checkpoint
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.step import micro_batches


def make_engine(models: Path, **train: object) -> Engine:
    path = str(tiny_model("bert", models))
    config = AutoConfig.from_pretrained(path, num_labels=2)
    base, new = load_base(
        path,
        ModelConfig(name_or_path=path),
        auto_class=AutoModelForSequenceClassification,
        model_config=config,
        unquantised=[],
        generator=generator_for(0, "head"),
    )
    placement = Placement(
        AdapterConfig(r=3), task_type="SEQ_CLS", new_modules=new, dtype="fp32", generator=generator_for(0, "adapter")
    )
    model = LoraAdapter().build(base, placement)
    settings = TrainConfig.model_validate({"max_steps": 9, "lr": 1e-2, **train})
    accelerator = start_accelerator(accumulation=1, timeout_minutes=10)
    return start_engine(accelerator, model, train=settings, micro_batch_size=4)


def step(engine: Engine, seed: int, lr: float = 1e-2, times: float = 1.0) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (4, 8), generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    with engine.micro_batch():
        logits = engine.forward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        engine.backward(times * loss)
    return loss.item(), engine.step(lr)


def test_a_rebuild_that_changes_nothing_changes_nothing(models_dir: Path) -> None:
    losses = []
    for rebuilds in (False, True):
        engine = make_engine(models_dir)
        first = [step(engine, seed) for seed in range(3)]
        if rebuilds:
            engine.rebuild(lambda _, state: state)
        losses.append(first + [step(engine, seed) for seed in range(3, 6)])
    assert losses[0] == losses[1]


def test_gather_and_rebuild_keep_moments_and_step_count(models_dir: Path) -> None:
    engine = make_engine(models_dir)
    assert engine.gather().optimizer_steps == 0
    for seed in range(3):
        step(engine, seed)
    before = engine.gather()
    assert before.optimizer_steps == 3
    engine.rebuild(lambda _, state: state)
    after = engine.gather()
    assert after.optimizer_steps == 3
    assert after.params.keys() == before.params.keys()
    for name, entry in before.params.items():
        assert torch.equal(entry.value, after.params[name].value)
        assert torch.equal(entry.exp_avg, after.params[name].exp_avg)
        assert torch.equal(entry.exp_avg_sq, after.params[name].exp_avg_sq)
    assert any(entry.exp_avg.abs().sum() > 0 for entry in before.params.values())


def test_the_learning_rate_is_the_steps_own(models_dir: Path) -> None:
    engine = make_engine(models_dir, lr=1.0)
    before = engine.gather()
    step(engine, 0, lr=0.0)
    after = engine.gather()
    assert all(torch.equal(entry.value, after.params[name].value) for name, entry in before.params.items())


def test_the_norm_is_reported_before_clipping(models_dir: Path) -> None:
    norms = [step(make_engine(models_dir, max_grad_norm=limit), 0)[1] for limit in (None, 1e-3)]
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta"])
def test_the_paper_layers_are_adapted(models_dir: Path, kind: str) -> None:
    config = AutoConfig.from_pretrained(tiny_model(kind, models_dir), num_labels=2)
    model = skeleton(AutoModelForSequenceClassification, config)
    targets = resolve_targets(model, "auto")
    assert len(targets) == 12, "six of each of two layers: query, key, value, attention output, intermediate, output"
    assert resolve_targets(model, ["dense"]) == sorted(t for t in targets if t.endswith("dense"))
    assert heads_of(model)
    assert not set(heads_of(model)) & set(targets)


def test_adapter_starts_as_the_identity(models_dir: Path) -> None:
    engine = make_engine(models_dir)
    for layer in lora_layers(engine.module).values():
        assert layer.lora_B["default"].weight.abs().sum() == 0
        assert layer.lora_A["default"].weight.abs().sum() > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_set_of_micro_batches_does_not_depend_on_the_ranks(world_size: int) -> None:
    torch_like = torch.arange(12).numpy()
    parts = [tuple(p) for rank in range(world_size) for p in micro_batches(torch_like, 2, rank, world_size)]
    assert sorted(parts) == [(i, i + 1) for i in range(0, 12, 2)]


def test_learning_rate() -> None:
    def at(step: int, **keys: object) -> float:
        return learning_rate(TrainConfig.model_validate({"max_steps": 100, "lr": 1.0, **keys}), step, 100)

    assert at(0, lr_warmup=10) == pytest.approx(0.1)
    assert at(9, lr_warmup=10) == at(10, lr_warmup=10) == 1.0
    assert at(55, lr_warmup=0.1) == pytest.approx(0.5)
    assert at(99, lr_schedule="constant") == 1.0
    assert at(50, lr_schedule="cosine") == pytest.approx(0.5)
    assert at(99) == pytest.approx(0.01)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    state = TrainState({"a": ParamState(torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3))}, 7)
    tree = {"step": 7, "nested": {"table": torch.arange(4), "none": None, "list": [1, "x"]}}
    write_checkpoint(tmp_path / "step-00000007", state, tree)
    found, read = read_checkpoint(tmp_path / "step-00000007")
    assert found.optimizer_steps == 7
    assert torch.equal(found.params["a"].exp_avg_sq, state.params["a"].exp_avg_sq)
    assert torch.equal(read["nested"]["table"], torch.arange(4))
    assert read["nested"]["list"] == [1, "x"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "step-00000001"
    write_checkpoint(folder, TrainState({"a": ParamState.fresh(torch.ones(3))}, 1), {"seen": torch.ones(2)})
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0x55
        file.write_bytes(content if damage == "flip" else content[:-3])
    # a digest that is damaged itself accuses the file that it belongs to
    expected = "step-00000001" if name == "manifest.json" else name
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        read_checkpoint(folder)


def test_a_path_cannot_escape_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    write_checkpoint(folder, TrainState(), {})
    (tmp_path / "outside").write_text("x")
    (folder / "manifest.json").write_text('{"../outside": "00"}')
    with pytest.raises(UserError, match="outside of it"):
        read_checkpoint(folder)


def test_the_launchers_accumulation_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert start_accelerator(accumulation=3, timeout_minutes=10).gradient_accumulation_steps == 3


def with_scaler(engine: Engine, patch: pytest.MonkeyPatch, scale: float, growth: int) -> torch.amp.GradScaler:
    """Give the engine the loss scaler that Accelerate would make for fp16 on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
    patch.setattr(engine.accelerator, "scaler", scaler)
    patch.setattr(engine.accelerator, "native_amp", True)
    patch.setattr(engine.accelerator.state, "_mixed_precision", "fp16")
    engine.rebuild(lambda _, state: state)
    return scaler


def test_a_loss_scaler_finds_its_scale_while_nothing_changes(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_engine(models_dir)
    expected = [step(plain, seed, times=1e4) for seed in range(4)]
    engine = make_engine(models_dir)
    scaler = with_scaler(engine, monkeypatch, 2.0**127, growth=100)
    before, overflows = engine.gather(), 0
    while scaler.get_scale() > 2.0**60:
        _, norm = step(engine, 0, times=1e4)
        if norm < float("inf"):
            break
        assert engine.overflow_is_normal
        overflows += 1
        for name, entry in engine.gather().params.items():
            assert torch.equal(entry.value, before.params[name].value)
            assert torch.equal(entry.exp_avg, before.params[name].exp_avg)
    assert overflows >= 1
    assert scaler.get_scale() == 2.0 ** (127 - overflows)
    got = [step(engine, seed, times=1e4) for seed in range(1, 4)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected[1:]), rtol=1e-5, atol=0)
    assert not plain.overflow_is_normal


def test_autocast_is_put_about_the_forward_once(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often ranks change. Under DDP Accelerate's mark is on the wrapper, which is not there any more then."""
    engine = make_engine(models_dir)
    with_scaler(engine, monkeypatch, 2.0, growth=100)
    for _ in range(3):
        engine.module.__dict__.pop("_is_accelerate_prepared", None)
        engine.rebuild(lambda _, state: state)
        wrapped = engine.module.__dict__["_original_forward"]
        assert wrapped.__func__ is type(engine.module).forward
        assert engine.module.forward is not wrapped


def test_the_loss_scaler_is_in_the_state(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = make_engine(models_dir), make_engine(models_dir)
    assert engine.scaler_state() is None
    scaler = with_scaler(engine, monkeypatch, 8.0, growth=3)
    for seed in range(4):
        step(engine, seed)
    state = json.loads(json.dumps(engine.scaler_state()))
    assert state["scale"] == 16.0
    assert state["_growth_tracker"] == 1
    fresh = with_scaler(other, monkeypatch, 2.0**16, growth=3)
    other.load_scaler_state(None)
    assert fresh.get_scale() == 2.0**16
    other.load_scaler_state(state)
    assert fresh.state_dict() == scaler.state_dict()
