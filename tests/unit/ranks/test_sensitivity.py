import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.reference import ranks as reference
from tests.unit.ranks.models import Batch, adapted, padded_batch
from tests.unit.ranks.trackers import SIZE, make_tracker, measure, on_two_ranks, split, train_step
from tsqlora_scale.config.schema import ResizeConfig, SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.model.adapters.lora import lora_layers
from tsqlora_scale.ranks.install import current_ranks, resize_model, set_ranks
from tsqlora_scale.ranks.policies.policy import Plan
from tsqlora_scale.ranks.sensitivity import SensitivityTracker

ESTIMATORS = ["weight", "weight_per_sample", "fisher", "adapter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def expected(model: nn.Module, batch: Batch, estimator: str, group_size: int) -> dict[str, float]:
    count = len(batch) // group_size
    groups = [lambda m, part=part: count * part.loss(m) for part in split(batch, count)]
    return reference.sensitivity(model, groups, estimator)


def assert_close(got: dict[str, float], want: dict[str, float], rel: float) -> None:
    assert got.keys() == want.keys()
    assert all(value > 0 for value in want.values())
    worst = max(abs(got[n] / want[n] - 1) for n in want)
    assert worst <= rel, f"worst relative difference {worst:.2e}"


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("tsqlora_scale")]


@pytest.mark.parametrize("kind", ["bert", "bart", "t5", "llama", "gpt2"])
@pytest.mark.parametrize(
    ("estimator", "group"), [("weight", 4), ("weight_per_sample", 1), ("fisher", 1), ("adapter", 4)]
)
def test_equals_autograd_with_padding(kind: str, estimator: str, group: int, folder: Path) -> None:
    model, batch = adapted(kind, folder), padded_batch(kind)
    assert_close(measure(model, [batch], estimator), expected(model, batch, estimator, group), rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_calls_without_a_batch_dimension_make_the_micro_batch_one_group(
    estimator: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeBERTa's key and query projections see the relative positions, too; both calls' gradients must be summed."""
    model, batch = adapted("deberta", folder), padded_batch("deberta")
    with caplog.at_level(logging.WARNING):
        got = measure(model, split(batch, 2), estimator, group=2)
    assert_close(got, expected(model, batch, estimator, SIZE // 2), rel=1e-4)
    (message,) = own_messages(caplog)
    assert "called without a batch dimension" in message


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["bert", "deberta", "llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool, estimator: str, folder: Path) -> None:
    model, batch = adapted(kind, folder), padded_batch(kind)
    plain = measure(model, split(batch, 2), estimator)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(measure(model, split(batch, 2), estimator), plain, rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.distributed
def test_accumulation_and_ranks_change_nothing(estimator: str, folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    whole = measure(model, [batch], estimator, group=2)
    for parts in (2, 4):
        assert_close(measure(model, split(batch, parts), estimator, group=2), whole, rel=1e-5)
    for heard in on_two_ranks(model, [batch], estimator):
        assert_close(heard.sensitivity, whole, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "group", "samples", "step"),
    [("weight", 1, 2, 4), ("weight", 1, 3, 3), ("weight", 2, 4, 2), ("weight", 2, 1, 4), ("adapter", 2, 4, 2),
     ("weight_per_sample", 1, 4, 2), ("fisher", 1, 4, 2), ("fisher", 1, 1, 8)],
)  # fmt: skip
@pytest.mark.distributed
def test_every_so_many_groups_of_the_global_batch_take_part(
    estimator: str, group: int, samples: int, step: int, folder: Path
) -> None:
    """So many that they stay within ``max_samples``, one at least; whoever trains on them."""
    model, batch = adapted("bert", folder), padded_batch("bert")
    count = SIZE // group
    chosen = [lambda m, part=part: count * part.loss(m) for part in split(batch, count)[::step]]
    want = reference.sensitivity(model, chosen, estimator)
    for parts in (1, 2, 4):
        got = measure(model, split(batch, parts), estimator, group=group, samples=samples)
        assert_close(got, want, rel=1e-4)
    for heard in on_two_ranks(model, [batch], estimator, group=group, samples=samples):
        assert_close(heard.sensitivity, want, rel=1e-4)


def test_others_take_part_in_the_next_step(folder: Path) -> None:
    """A batch is in order of length: the same places would be texts of about one length in every step."""
    model, batch = adapted("bert", folder), padded_batch("bert")
    for step in range(5):
        chosen = [lambda m, part=part: SIZE * part.loss(m) for part in split(batch, SIZE)[step % 4 :: 4]]
        want = reference.sensitivity(model, chosen, "weight")
        assert_close(measure(model, split(batch, 2), group=1, samples=2, step=step), want, rel=1e-4)


@pytest.mark.distributed
def test_of_whole_micro_batches_some_take_part(folder: Path) -> None:
    model, batch = adapted("deberta", folder), padded_batch("deberta")
    parts = split(batch, 4)
    want = reference.sensitivity(model, [lambda m, part=part: 4 * part.loss(m) for part in parts[::2]], "weight")
    assert_close(measure(model, parts, group=1, samples=4), want, rel=1e-4)
    one_rank = reference.sensitivity(model, [lambda m: 4 * parts[0].loss(m)], "weight")
    # one rank hears nothing
    for heard in on_two_ranks(model, [batch], "weight", group=1, samples=2):
        assert_close(heard.sensitivity, one_rank, rel=1e-4)


@pytest.mark.parametrize(
    ("estimator", "group", "bound"),
    [("weight", 4, 0.02), ("weight_per_sample", 1, 0.02), ("fisher", 1, 0.04), ("adapter", 4, 0.02)],
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bf16_is_within_two_percent_and_squares_within_four(
    kind: str, estimator: str, group: int, bound: float, folder: Path
) -> None:
    batch = padded_batch(kind)
    got = measure(adapted(kind, folder, dtype=torch.bfloat16), [batch], estimator)
    assert_close(got, expected(adapted(kind, folder), batch, estimator, group), rel=bound)


def test_listening_does_not_change_training(folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")

    def gradients() -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    batch.loss(model).backward()
    plain = gradients()
    model.zero_grad()
    measure(model, [batch])
    heard = gradients()
    assert heard.keys() == plain.keys()
    assert all(torch.equal(heard[n], plain[n]) for n in plain)


def test_moving_average_is_bias_corrected_over_listened_steps(folder: Path) -> None:
    model = adapted("bert", folder)
    tracker = make_tracker(every=3, beta=0.85)
    tracker.attach(model)
    single = []
    for step in range(7):
        batch = padded_batch("bert", seed=step)
        train_step(tracker, model, [batch], step=step)
        if step % 3 == 0:
            single.append(expected(model, batch, "weight", 4))
    weights = [0.85**2, 0.85, 1.0]
    want = {n: sum(w * s[n] for w, s in zip(weights, single, strict=True)) / sum(weights) for n in single[0]}
    assert_close(tracker.reduce(World()), want, rel=1e-4)


@pytest.mark.distributed
def test_uncertainty_is_adaloras_and_that_of_all_ranks_together(folder: Path) -> None:
    """2303.10512, Eq. 9 to 11, with bias corrections; |I - mean I| is not linear, so ranks must not average it."""
    model, batches = adapted("bert", folder), [padded_batch("bert", seed=seed) for seed in range(4)]
    tracker = make_tracker(beta=0.85, uncertainty=0.7, group=2)
    tracker.attach(model)
    values = []
    for step, batch in enumerate(batches):
        train_step(tracker, model, [batch], step=step)
        values.append(expected(model, batch, "weight", 2))
        if step == 0:
            assert set(copy.deepcopy(tracker).reduce(World()).values()) == {0.0}
    tracker.detach()
    want = {}
    for name in values[0]:
        mean = weight = deviation = deviation_weight = 0.0
        for value in values:
            mean, weight = 0.85 * mean + 0.15 * value[name], 0.85 * weight + 0.15
            deviation = 0.7 * deviation + 0.3 * abs(value[name] - mean / weight)
            deviation_weight = 0.7 * deviation_weight + 0.3
        want[name] = mean / weight * deviation / deviation_weight
    assert_close(tracker.reduce(World()), want, rel=1e-3)
    for heard in on_two_ranks(model, batches, "weight", beta=0.85, uncertainty=0.7):
        assert_close(heard.sensitivity, want, rel=1e-3)
    tracker.synchronize(World())
    again = make_tracker(beta=0.85, uncertainty=0.7, group=2)
    again.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert again.reduce(World()) == tracker.reduce(World())


def test_with_events_the_last_steps_before_each_are_listened_to() -> None:
    def heard(**sampled) -> list[int]:
        cfg = SensitivityConfig(**sampled)
        tracker = SensitivityTracker(cfg, batch_size=SIZE, micro_batch_size=SIZE, events=(3, 10, 20))
        return [step for step in range(25) if tracker.listens(step)]

    # an event after n finished steps follows step number n - 1
    assert heard(every=1, window=2) == [1, 2, 8, 9, 18, 19]
    assert heard(every=3, window=None) == [2, 3, 6, 9, 10, 13, 16, 19]
    assert heard(every=3, window=4) == [2, 6, 9, 16, 19]
    assert heard(every=1, window=None) == list(range(20))


def test_state_round_trips_through_json_and_continues(folder: Path) -> None:
    model = adapted("bert", folder)
    one, two = make_tracker(beta=0.85), make_tracker(beta=0.85)
    one.attach(model)
    train_step(one, model, [padded_batch("bert", seed=0)])
    one.synchronize(World())
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.reduce(World()) == one.reduce(World())
    results = []
    for tracker in (one, two):
        one.detach()
        tracker.attach(model)
        train_step(tracker, model, [padded_batch("bert", seed=1)], step=1)
        tracker.detach()
        results.append(tracker.reduce(World()))
    assert results[0] == results[1]


def test_a_layer_without_gradient_counts_as_zero_and_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    name = next(n for n in lora_layers(model) if n.endswith("layer.0.attention.self.value"))
    lora_layers(model)[name].get_base_layer().register_forward_hook(lambda module, args, out: out.detach())
    for parameter in (lora_layers(model)[name].lora_A, lora_layers(model)[name].lora_B):
        parameter.requires_grad_(False)
    tracker = make_tracker()
    tracker.attach(model)
    train_step(tracker, model, [batch])
    with caplog.at_level(logging.WARNING):
        got = tracker.reduce(World())
        tracker.reduce(World())
    assert got[name] == 0.0
    assert all(value > 0 for n, value in got.items() if n != name)
    (message,) = own_messages(caplog)
    assert name in message


def test_a_step_that_overflows_is_skipped(folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    tracker = make_tracker(beta=0.85)
    tracker.attach(model)
    train_step(tracker, model, [batch])
    before = tracker.reduce(World())
    tracker.start_step(1, loss_scale=1.0)
    tracker.start_micro_batch(SIZE, 0)
    (math.inf * batch.loss(model)).backward()
    tracker.end_step(taken=True)
    assert tracker.reduce(World()) == before


def test_an_output_that_never_reaches_the_loss_is_not_waited_for(folder: Path) -> None:
    """A layer is called a second time, and nobody uses the result: what has arrived is still counted."""
    model, batch = adapted("bert", folder), padded_batch("bert")
    plain = measure(model, [batch])
    layer = next(m for n, m in lora_layers(model).items() if n.endswith("layer.0.attention.self.value"))
    calls = []

    def call_again(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if not calls:
            calls.append(1)
            module(args[0])

    layer.register_forward_hook(call_again)
    assert_close(measure(model, [batch]), plain, rel=1e-5)
    assert calls


def test_hooks_are_idle_between_listened_steps_and_gone_after_detach(folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    without = hooks()
    tracker = make_tracker(every=2)
    tracker.attach(model)
    attached = hooks()
    tracker.attach(model)
    assert hooks() == attached == without + len(lora_layers(model))
    train_step(tracker, model, [batch], step=0)
    before = tracker.reduce(World())
    train_step(tracker, model, [batch], step=1)
    assert tracker.reduce(World()) == before
    tracker.detach()
    assert hooks() == without


def test_adapter_estimator_follows_a_resize(folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    tracker = make_tracker("adapter")
    tracker.attach(model)
    train_step(tracker, model, [batch])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = TrainState({n: ParamState.fresh(p.detach().clone()) for n, p in trained.items()})
    ranks = {name: 2 + i % 3 for i, name in enumerate(current_ranks(model))}
    plan = Plan(ranks=ranks, phi=1.0, budget=0, sensitivity={}, reasons={})
    resize_model(model, state, plan, cfg=ResizeConfig(), seed=0, step=1)
    tracker.attach(model)
    train_step(tracker, model, [batch], step=1)
    assert_close(tracker.reduce(World()), expected(model, batch, "adapter", 4), rel=1e-4)


@pytest.mark.parametrize(
    ("estimator", "group"), [("weight", 4), ("weight_per_sample", 1), ("fisher", 1), ("adapter", 4)]
)
def test_a_layer_of_rank_0_is_heard_by_its_weight_alone(
    estimator: str, group: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    tracker = make_tracker(estimator, beta=0.5)
    tracker.attach(model)
    train_step(tracker, model, [batch])
    before = tracker.reduce(World())
    removed = sorted(before)[::3]
    set_ranks(model, {name: 0 if name in removed else 3 for name in before})
    for layer in lora_layers(model).values():
        if layer.r["default"]:
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    tracker.attach(model)
    for step in range(1, 30):  # until the former value is forgotten
        train_step(tracker, model, [batch], step=step)
    with caplog.at_level(logging.WARNING):
        got = tracker.reduce(World())
    assert own_messages(caplog) == []
    want = expected(model, batch, estimator, group)
    if estimator == "adapter":
        assert [got.pop(name) for name in removed] == [0.0] * len(removed)
        want = {name: value for name, value in want.items() if name not in removed}
    assert_close(got, want, rel=1e-4)
    set_ranks(model, dict.fromkeys(before, 2))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A["default"].weight, std=0.1)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    tracker.attach(model)
    train_step(tracker, model, [batch], step=30)
    after, now = tracker.reduce(World()), expected(model, batch, estimator, group)
    if estimator == "adapter":  # a new average, without a memory of the time before
        assert [after[name] for name in removed] == pytest.approx([now[name] for name in removed], rel=1e-4)
    assert all(value > 0 for value in after.values())


def test_automatic_group_size() -> None:
    # the one size that every micro-batch is a multiple of: accumulation must not change the ranks
    assert [make_tracker(micro=m, group="auto").group_size for m in (8, 4, 2, 1)] == [1, 1, 1, 1]
    assert make_tracker("fisher", group=4).group_size == 1


@pytest.mark.parametrize(
    ("estimator", "group"), [("weight", 4), ("weight_per_sample", 1), ("fisher", 1), ("adapter", 4)]
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_nf4_weights_are_dequantised(kind: str, estimator: str, group: int, folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, batch = adapted(kind, folder), padded_batch(kind)
    quantised = adapted(kind, folder)
    for layer in lora_layers(quantised).values():
        layer.base_layer = quantise(layer.get_base_layer(), bitsandbytes)
    weights = {n: dequantised(layer, bitsandbytes) for n, layer in lora_layers(quantised).items()}
    got = measure(quantised, [batch], estimator)
    for name, layer in lora_layers(model).items():
        layer.get_base_layer().weight.data = weights[name]
    assert_close(got, expected(model, batch, estimator, group), rel=1e-4)


def quantise(linear: nn.Linear, bitsandbytes) -> nn.Module:
    new = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    new.support_avx512bf16_for_cpu = False
    new.load_state_dict(linear.state_dict())
    return new.to("cpu").requires_grad_(False).train()


def dequantised(layer, bitsandbytes) -> Tensor:
    weight = layer.get_base_layer().weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
