"""Samples laid end to end: every token has its place, and every sample is what it is alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, masking_utils, modeling_flash_attention_utils

from tests import zoo
from tests.reference.tasks import laid_one_by_one
from tests.runs import run_tree
from tsqlora_scale.audit.passes import StateLook
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.model.pass_check import check_loaded
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.online.factor_gradients import FactorGradients
from tsqlora_scale.quality.query.looks import FeatureLook
from tsqlora_scale.ranks.sensitivity import SensitivityTracker
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.batch import IGNORED, pad_rows, places_of
from tsqlora_scale.tasks.packing import Packer, lay, rows_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths=LENGTHS, longest_row=st.integers(1, 80), width=st.sampled_from([1, 8, 512]))
@settings(max_examples=150, deadline=None)
def test_every_sample_has_a_row(lengths: list[int], longest_row: int, width: int) -> None:
    rows = rows_of(lengths, longest_row=longest_row, width=width)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) for row in rows)
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    assert longest <= max(longest_row, *lengths)
    assert len(rows) * longest <= len(lengths) * max(lengths), "never more positions than without"


def test_rows_that_cost_least() -> None:
    rows = partial(rows_of, longest_row=100)
    assert rows([30, 10, 10, 10], width=64) == [[0], [1, 2, 3]]
    assert rows([9, 9, 9, 9], width=10**6) == [[0], [1], [2], [3]], "nothing is padded"
    assert rows([9, 9, 9, 7], width=10**6) == [[0], [1], [2], [3]], "hardly anything is"
    assert rows([40, 30, 1], width=10**6) == [[0, 1, 2]]
    assert rows([40, 30, 1], width=1) == [[0], [1, 2]], "attention costs more than all else"
    assert rows([10, 60, 59], width=10**6) == [[1], [0, 2]], "one row would be too long"


@given(lengths=LENGTHS, seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_tokens_lie_where_one_by_one_lays_them(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 1000, length).tolist() for length in lengths]
    targets = pad_rows([[token if rng.random() < 0.5 else IGNORED for token in text] for text in texts], IGNORED)
    inputs = {"input_ids": pad_rows(texts, 7), "attention_mask": pad_rows([[1] * length for length in lengths], 0)}
    rows = rows_of(lengths, longest_row=80, width=8)
    packing = lay(inputs, places_of(targets, 1), rows)
    expected = laid_one_by_one(texts, rows)
    for name, values in (packing.inputs | {"samples": packing.samples}).items():
        assert values.tolist() == expected[name], name
    # a loss is taken at the same tokens, in the same order
    shown = packing.inputs["input_ids"].flatten()[packing.places]
    assert torch.equal(shown, inputs["input_ids"].flatten()[places_of(targets, 1)])
    # there and back
    states = torch.randn(*packing.shape, 3)
    back = packing.rows(states)
    assert back.shape == (*inputs["input_ids"].shape, 3)
    for sample, length in enumerate(lengths):
        group = packing.tokens_of(states, slice(sample, sample + 1))
        assert torch.equal(back[sample, :length], group)
        assert not back[sample, length:].any()
        assert torch.equal(group, states[packing.samples == sample])
    assert torch.equal(packing.laid(back), states * (packing.samples < len(texts))[..., None])


def built(tmp_path: Path, models: Path, kind: str = "llama", *, packing: bool = True, **sections: Any) -> Run:
    train = {"packing": packing, "micro_batch_size": 6}
    return build_run(preflight.check(parse_config(run_tree(kind, tmp_path, models, "run", train=train, **sections))))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, Run]:
    """Runs of which the model and the task are looked at, and no more."""
    return {kind: built(tmp_path_factory.mktemp(kind), models_dir, kind) for kind in ("llama", "gpt2")}


def samples(run: Run) -> tuple[Any, Any]:
    """Six short samples and two long ones, in some order, laid end to end; and the same, a row each."""
    by_length = np.argsort(run.task.sizes(range(48)), kind="stable")
    rows = by_length[[0, -1, 1, 2, 3, -2, 4, 5]]
    packer, packed = run.task.packer, run.task.batch(rows)
    run.task.packer = None
    plain = run.task.batch(rows)
    run.task.packer = packer
    assert packed.packing is not None and packed.packing.shape.numel() < 8 * packed.packing.padded[1]
    assert plain.packing is None
    return packed, plain


def trained(run: Run) -> dict[str, torch.nn.Parameter]:
    named = {name: p for name, p in run.engine.module.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for param in named.values():  # the second factors are zero at the start
            param.normal_(0, 0.1)
    return named


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_the_same(
    kind: str, attention: str, checkpointing: bool, runs: dict[str, Run], request: pytest.FixtureRequest
) -> None:
    run = runs[kind]
    module: Any = run.engine.module.train()
    before = module.config._attn_implementation
    module.config._attn_implementation = attention
    request.addfinalizer(lambda: setattr(module.config, "_attn_implementation", before))
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        request.addfinalizer(module.gradient_checkpointing_disable)
    params, found = trained(run), []
    for batch in samples(run):
        losses = run.task.losses(module, batch)
        gradients = torch.autograd.grad(losses @ torch.arange(1.0, 9.0), list(params.values()))
        found.append((losses, gradients))
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)


def test_logits_of_few_places(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are not computed elsewhere."""
    run = runs["llama"]
    monkeypatch.setattr("tsqlora_scale.tasks.needed_logits.WORTH", 0)
    (batch, plain), module = samples(run), run.engine.module.eval()
    assert run.task.outputs(module, batch).logits.shape[:2] == (1, len(batch.places))
    torch.testing.assert_close(run.task.losses(module, batch), run.task.losses(module, plain))


@pytest.mark.parametrize("sketched", [False, True])
def test_scores_of_single_samples_are_the_same(sketched: bool, runs: dict[str, Run]) -> None:
    run = runs["llama"]
    trained(run)
    module, losses, sketch = run.engine.module, run.task.losses, Sketch(16, seed=0) if sketched else None
    found: list[Any] = []
    with PerSampleGradients(module, theta_modules(module)) as gradients:
        for batch in samples(run):
            values, of_theta = gradients.per_sample(losses, batch)
            with gradients.stepped(of_theta, 0.1):
                after = losses(module, batch)
            folded = gradients.folded(losses, batch, sketch=sketch)
            found.append((values, of_theta, after, folded, gradients.losses_alone(losses, batch)))
            assert gradients.batchless is None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_online_gradients_are_the_same(runs: dict[str, Run]) -> None:
    run = runs["llama"]
    params, found = trained(run), []
    listener = FactorGradients(theta_modules, sketch_dim=16, seed=0)
    listener.attach(run.engine.module)
    for batch in samples(run):
        listener.start(batch.size, batch.packing)
        losses = run.task.losses(run.engine.module, batch)
        gradients = torch.autograd.grad(losses.sum(), list(params.values()))
        found.append((listener.stop(), gradients))
    listener.detach()
    assert listener.shared is None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("estimator", "group"), [("weight", 2), ("weight", 8), ("fisher", 1), ("adapter", 4)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sensitivities_are_the_same(kind: str, estimator: Any, group: int, runs: dict[str, Run]) -> None:
    run = runs[kind]
    trained(run)
    found = []
    for batch in samples(run):
        cfg = SensitivityConfig(estimator=estimator, group_size=group, beta=0.0, max_samples=None)
        tracker = SensitivityTracker(cfg, batch_size=8, micro_batch_size=8, events=[1])
        tracker.attach(run.engine.module)
        tracker.start_step(0, loss_scale=1.0)
        tracker.start_micro_batch(batch.size, 0, batch.packing)
        run.task.losses(run.engine.module, batch).mean().backward()
        tracker.end_step(taken=True)
        tracker.detach()
        found.append(tracker.reduce(World()))
    assert min(found[1].values()) > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_features_are_the_same(runs: dict[str, Run]) -> None:
    """Of hidden states and losses, in one forward."""
    run = runs["llama"]
    trained(run)
    looks: list[Any] = [FeatureLook(run.task, seed=0), LastLayerLook(by_position=True), StateLook(0)]
    with torch.no_grad():
        found = [[look(run.engine.module.eval(), batch) for look in looks] for batch in samples(run)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)


def test_windows_are_of_a_sample(tmp_path: Path, models_dir: Path) -> None:
    """Where attention looks back a few tokens, it does so in the sample, however far it stands from the row's start."""
    zoo.CONFIGS["mistral-windowed"] = lambda: MistralConfig(**zoo.DECODER, sliding_window=3)
    try:
        tree = zoo.tree_of("mistral-windowed", tmp_path, models_dir, train={"packing": True})
    finally:
        del zoo.CONFIGS["mistral-windowed"]
    run = build_run(preflight.check(parse_config(tree)))
    module = run.engine.module.eval()
    torch.testing.assert_close(*(run.task.losses(module, batch) for batch in samples(run)))


@pytest.mark.parametrize("kind", ["mamba", "jamba", "bloom", "opt"])
def test_models_that_do_not_keep_samples_apart(kind: str, tmp_path: Path, models_dir: Path) -> None:
    tree = zoo.tree_of(kind, tmp_path, models_dir, train={"packing": True})
    with pytest.raises(UserError, match=rf"train\.packing: .* is a {kind} model, which was not seen to keep texts"):
        preflight.check(parse_config(tree))


def test_tasks_that_are_not_of_one_text(tmp_path: Path, models_dir: Path) -> None:
    for kind in ("bert", "bart"):
        with pytest.raises(UserError, match=r"'train\.packing: true' lays texts of causal models end to end"):
            parse_config(run_tree(kind, tmp_path, models_dir, "run", train={"packing": True}))


def test_what_else_a_model_receives() -> None:
    packer = Packer(width=8, longest_row=8)
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"task\.objective gives the model input_ids, token_type_ids"):
        packer.packed({"input_ids": ids, "token_type_ids": ids}, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match=r"task\.objective takes losses of its own"):
        packer.packed({"input_ids": ids, "attention_mask": ids}, None)


def test_a_kernel_that_mixes_samples(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that the copy could not be tried with is tried when the model is there."""
    run = runs["llama"]
    model = run.config.model.model_copy(update={"attention": "flex_attention"})
    config = run.config.model_copy(update={"model": model})
    module = run.engine.module.train()
    check_loaded(config, module, run.task, World())
    assert module.training
    monkeypatch.setattr(masking_utils, "packed_sequence_compatibility_function", lambda function, *_: function)
    with pytest.raises(UserError, match=r"with model\.attention='flex_attention' this llama model does not keep"):
        check_loaded(config, module, run.task, World())


def varlen(calls: list[list[int]]) -> Callable[..., torch.Tensor]:
    """What flash attention does with samples of any length, slowly."""

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any,
        max_seqlen_q: int, max_seqlen_k: int, causal: bool = False, softmax_scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        begins = cu_seqlens_q.tolist()
        calls.append(begins)
        assert (max_seqlen_q, max_seqlen_k) == (max(np.diff(begins)),) * 2
        out = []
        for start, end in pairwise(begins):
            parts = [part[start:end].transpose(0, 1)[None] for part in (q, k, v)]
            out.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *parts, is_causal=causal, scale=softmax_scale, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(out)

    return function


def test_flash_attention_gets_one_row(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs["llama"]
    expected = run.task.losses(run.engine.module.eval(), samples(run)[1])
    calls: list[list[int]] = []
    slow = varlen(calls)
    keys = modeling_flash_attention_utils._lazy_define_process_function(slow)
    functions = (None, slow, None, None, None), (keys, dict)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: functions)
    base: Any = run.engine.module
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(run.task, "packer", Packer(width=32, longest_row=8, flash=True, takes_starts=True))
    batch, _ = samples(run)
    assert batch.packing.shape[0] == 1
    losses = run.task.losses(base, batch)
    torch.testing.assert_close(losses, expected)
    assert calls == [list(batch.packing.starts)] * 2, "in every layer"
