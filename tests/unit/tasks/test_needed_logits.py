"""Logits of the places that a loss is taken at are those of all places, there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.queried import queried
from tests.runs import go, losses_of, ranks_of, run_tree
from tests.tiny import VOCAB
from tests.zoo import CONFIGS, DECODER
from tsqlora_scale.tasks import losses, needed_logits
from tsqlora_scale.tasks.batch import IGNORED, places_of
from tsqlora_scale.tasks.losses import losses_at, token_cross_entropy, token_losses

#: Caps and scales of logits; others are the zoo's, some with a bias.
SCALED: dict[str, Any] = {
    "gemma2": lambda: t.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=2.0),
    "cohere": lambda: t.CohereConfig(**DECODER, logit_scale=0.25),
    "granite": lambda: t.GraniteConfig(**DECODER, logits_scaling=4.0),
}
KINDS = [
    *SCALED, "llama", "llama-tied", "mixtral", "gemma3", "gpt2", "opt", "bloom", "mamba", "bert-decoder",
    "roberta-decoder", "xlnet", "xlm", "bart", "t5", "mbart", "led", "m2m_100",
]  # fmt: skip


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 1))
def test_places(counted: list[list[bool]], shift: int) -> None:
    targets = torch.where(torch.tensor(counted), torch.arange(4) + 1, IGNORED)
    expected = [
        row * 4 + column - shift for row in range(len(counted)) for column in range(shift, 4) if counted[row][column]
    ]
    places = places_of(targets, shift)
    assert places.tolist() == expected
    logits = torch.randn(len(counted), 4, 7)
    found = losses_at(logits.flatten(0, 1)[places], targets, places, shift=shift)
    wanted = token_losses(logits[:, : 4 - shift], targets[:, shift:])
    torch.testing.assert_close(found[0], wanted[0])
    if not shift or not any(row[0] for row in counted):
        assert torch.equal(found[1], wanted[1])


@given(st.integers(1, 9), st.integers(2, 6), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_cross_entropy_in_parts(rows: int, classes: int, part: int, dtype: torch.dtype) -> None:
    """Against autograd's own, whole; with weights, as those of samples are."""
    torch.manual_seed(rows)
    logits = (4 * torch.randn(rows, classes)).to(dtype)
    targets, weights = torch.randint(0, classes, (rows,)), torch.randn(rows)
    found: list[tuple[Tensor, Tensor]] = []
    for many in (0, 10**9):
        own = logits.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "MANY", many)
            patch.setattr(losses, "PART", part)
            values = token_cross_entropy(own, targets)
            (gradient,) = torch.autograd.grad((values * weights).sum(), own)
        assert values.dtype == torch.float32 and gradient.dtype == dtype
        found.append((values, gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_logits_that_are_not_finite_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MANY", 0)
    logits = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [1.0, 0.0]])
    values = token_cross_entropy(logits, torch.tensor([0, 1, 0]))
    assert values.isfinite().tolist() == [False, False, True]


def outcome(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, shift: int) -> tuple[Any, Tensor, Any]:
    """Logits, losses and gradients of the embeddings by a forward on the places that are needed."""
    places = places_of(targets, shift)
    with needed_logits.needed_logits(model, places, targets.shape):
        logits = model(**inputs).logits
    shape = tuple(logits.shape[:2])
    if shape == tuple(targets.shape):
        logits = logits.flatten(0, 1)[places][None]
    sums, _ = losses_at(logits[0], targets, places, shift=shift)
    (embedding,) = torch.autograd.grad(sums.sum(), [model.get_input_embeddings().weight])  # type: ignore[operator]
    return shape, sums.detach(), embedding


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they do to their logits: caps, scales, biases."""
    torch.manual_seed(0)
    model_config = (SCALED | CONFIGS)[kind]()
    shift = 0 if model_config.is_encoder_decoder else 1
    auto = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(model_config).eval()
    ids = torch.randint(5, VOCAB - 5, (3, 8))
    targets = ids.clone()
    targets[0, :5] = targets[1, :3] = targets[2, 5:] = targets[2, :2] = IGNORED
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.roll(1, 1)
    whole = outcome(model, inputs, targets, shift)
    assert whole[0] == (3, 8), "little would be saved"
    monkeypatch.setattr(needed_logits, "WORTH", 1)
    few = outcome(model, inputs, targets, shift)
    assert few[0] == (1, 11)
    torch.testing.assert_close(few[1], whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few[2], whole[2], rtol=1e-4, atol=1e-5)


def test_an_adapted_output_layer_is_called_on_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own gradients per sample, and what listens to it, need them."""
    monkeypatch.setattr(needed_logits, "WORTH", 1)
    ids = torch.randint(5, VOCAB - 5, (2, 4))
    for targets, shape in ((["q_proj"], (1, 2)), (["lm_head"], (2, 4))):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(CONFIGS["llama"]()), LoraConfig(target_modules=targets, r=2)
        )
        with needed_logits.needed_logits(model, torch.tensor([0, 5]), ids.shape):
            assert model(input_ids=ids).logits.shape[:2] == shape
        assert model(input_ids=ids).logits.shape[:2] == (2, 4)


def test_a_run_scores_and_trains_the_same(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-sample gradients, exact loss reductions and rank events on both."""
    runs = []
    for name, worth in (("whole", 2**40), ("few", 1)):
        monkeypatch.setattr(needed_logits, "WORTH", worth)
        runs.append(go(run_tree("llama", tmp_path, models_dir, name, scoring={"delta_loss": "exact"})))
    whole, few = (run.record.folder for run in runs)
    assert losses_of(few) == pytest.approx(losses_of(whole), rel=1e-4)
    assert ranks_of(few) == ranks_of(whole)
    tables = [run.selector.table for run in runs]
    assert tables[0] is not None and tables[1] is not None
    np.testing.assert_allclose(tables[1].grad_norm, tables[0].grad_norm, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_choice_by_a_query_looks_at_few_logits(
    kind: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose features are of the states, and whose losses are of the answers' own places."""
    widths: list[int] = []
    seen = {}

    def watched(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        widths.append(logits.shape[0] * logits.shape[1])
        return at_places(logits, batch)

    at_places = needed_logits.at_places
    monkeypatch.setattr("tsqlora_scale.tasks.task.at_places", watched)
    for worth in (2**40, 1):
        monkeypatch.setattr(needed_logits, "WORTH", worth)
        widths.clear()
        table = go(queried(kind, tmp_path, models_dir, f"{kind}-{worth}")).selector.table
        assert table is not None
        seen[worth] = (max(widths), table.quality)
    assert seen[1][0] < seen[2**40][0]
    np.testing.assert_allclose(seen[1][1], seen[2**40][1], atol=1e-3)


def test_what_is_no_model_is_left_alone() -> None:
    with needed_logits.needed_logits(F.relu, torch.tensor([0]), torch.Size([2, 4])):
        pass
