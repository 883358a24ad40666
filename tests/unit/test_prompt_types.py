"""What stands before every text: against PEFT's own, against slow versions, and beside padding."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.classifiers import tiny_classifier
from tests.placed import base_of, built, some_inputs
from tests.reference import adapters as reference
from tests.tiny import tiny_model
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.model.adapters.placed_model import PlacedModel
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.prefix_tuning import Prefix, PrefixTuning
from tsqlora_scale.model.adapters.prompt_tuning import (
    SLOT,
    PromptedModel,
    PromptTuning,
    drawn_tokens,
    inserted,
    taken_out,
)
from tsqlora_scale.model.placed_trial import fault_of
from tsqlora_scale.tasks import needed_logits

P = 3
TASK_TYPES = {
    "bert": "SEQ_CLS",
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bart": "SEQ_2_SEQ_LM",
    "t5": "SEQ_2_SEQ_LM",
}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), count=st.integers(1, 4), left=st.booleans(),
    first=st.booleans(),
)  # fmt: skip
def test_rows_with_a_prompt_by_the_letter(lengths: list[int], count: int, left: bool, first: bool) -> None:
    width = max(lengths)
    real = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    rows = [[10 * i + j + 1 for j in range(width)] for i in range(len(lengths))]
    between = list(range(-1, -1 - count, -1))
    ids, mask = torch.tensor(rows), torch.tensor(real)
    lead = (mask.cumsum(1) == 0).sum(1, keepdim=True) + int(first)
    found = inserted(ids, lead, torch.tensor(between))
    expected = [
        reference.row_with_prompt(row, of_text, between, behind_first=first)
        for row, of_text in zip(rows, real, strict=True)
    ]
    assert found.tolist() == expected
    assert torch.equal(taken_out(found, lead, count), ids)
    assert torch.equal(taken_out(found[..., None].expand(-1, -1, 2), lead, count), ids[..., None].expand(-1, -1, 2))


class Layer(nn.Module):
    """What a function of attention reads of its layer."""


Layer.__module__ = LlamaAttention.__module__  # where eager attention's function is


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**30), length=st.integers(1, 5), count=st.integers(1, 3),
    masked=st.sampled_from(["none", "causal", "bool", "float"]), groups=st.sampled_from([1, 2]),
    attention=st.sampled_from(["eager", "sdpa"]),
)  # fmt: skip
def test_attention_with_a_prefix_by_the_letter(
    seed: int, length: int, count: int, masked: str, groups: int, attention: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, heads, size = 2, 2, 3
    layer = Layer()
    layer.num_key_value_groups, layer.is_causal = groups, masked == "causal"  # type: ignore[assignment]
    layer.prefix = Prefix(count, (heads * size, heads * size), generator)

    def drawn(n: int) -> torch.Tensor:
        return torch.empty(rows, n, length, size).normal_(generator=generator)

    query, key, value = drawn(heads * groups), drawn(heads), drawn(heads)
    seen = torch.ones(rows, 1, length, length, dtype=torch.bool)
    if masked == "causal":
        seen = seen.tril()
    elif masked != "none":
        seen = torch.rand(seen.shape, generator=generator) < 0.6
    mask = None if masked in ("none", "causal") else seen
    if masked == "float" or (attention == "eager" and masked != "none"):  # which adds its masks
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    found, _ = ALL_ATTENTION_FUNCTIONS[f"prefix_{attention}"](layer, query, key, value, mask, scaling=size**-0.5)
    own_keys, own_values = (p.view(count, heads, size) for p in (layer.prefix.keys, layer.prefix.values))
    for row in range(rows):
        for head in range(heads * groups):
            one = head // groups
            for place in range(length):
                expected = reference.attention_with_prefix(
                    query[row, head, place], list(key[row, one]), list(value[row, one]),
                    seen[row, 0, place].tolist(), (own_keys[:, one], own_values[:, one]),
                )  # fmt: skip
                torch.testing.assert_close(found[row, place, head].double(), expected, atol=1e-5, rtol=1e-5)


def peft_of(kind: str, base: Any, config: type, count: int) -> Any:
    theirs = get_peft_model(copy.deepcopy(base), config(task_type=TASK_TYPES[kind], num_virtual_tokens=count))
    return theirs.eval()


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_prompts_are_pefts(models_dir: Path, kind: str) -> None:
    """Where PEFT reads the right place. A classifier's, which stay behind the first token, are its own with that."""
    model, inputs = built("prompt", kind, models_dir, prompt_tokens=P).eval(), some_inputs(kind)
    base = model.get_base_model()
    vectors, whole = base.get_submodule(SLOT).vectors, kind == "bert"
    theirs = peft_of(kind, base_of(kind, models_dir), PromptTuningConfig, P + int(whole))
    theirs.base_model.load_state_dict(base.state_dict(), strict=False)
    asked = dict(inputs)
    if whole:
        first = inputs["input_ids"][0, 0]
        inputs["input_ids"][:, 0] = first
        asked = {name: tensor[:, 1:] for name, tensor in inputs.items()}
        vectors = torch.cat([base.get_input_embeddings().weight[first][None], vectors])
    theirs.prompt_encoder["default"].embedding.weight.data[: len(vectors)] = vectors
    with torch.no_grad():
        found, expected = model(**inputs).logits, theirs(**asked).logits
    expected = expected[:, P:] if TASK_TYPES[kind] == "CAUSAL_LM" else expected
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


#: where the layers' prefixes are, of those models whose layers PEFT numbers alike
PLACES = {
    "bert": "bert.encoder.layer.{}.attention.self", "llama": "model.layers.{}.self_attn",
    "gpt2": "transformer.h.{}.attn", "bart": "model.decoder.layers.{}.self_attn",
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_prefixes_are_pefts(models_dir: Path, kind: str) -> None:
    """PEFT counts a text's positions from P on. Of an encoder-decoder it has prefixes of the decoder's own attention
    alone, and gives all its layers those of the first.
    """
    model, inputs = built("prefix", kind, models_dir, prompt_tokens=P).eval(), some_inputs(kind)
    base = model.get_base_model()
    theirs = peft_of(kind, base_of(kind, models_dir), PrefixTuningConfig, P)
    theirs.base_model.load_state_dict(base.state_dict(), strict=False)
    own = [base.get_submodule(f"{PLACES[kind].format(layer)}.prefix") for layer in range(2)]
    if kind == "bart":
        own[1].load_state_dict(own[0].state_dict())
    both = torch.cat([part for one in own for part in (one.keys, one.values)], dim=1)
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(both)
    for part in base.modules():
        if isinstance(part, Prefix) and all(part is not one for one in own):
            part._disable_adapters = True
    with torch.no_grad():
        expected = theirs(**inputs).logits
        if kind == "bart":
            base.model.decoder.embed_positions.offset += P
            found = model(**inputs).logits
        else:
            found = model(**inputs, position_ids=torch.arange(P, P + inputs["input_ids"].shape[1])[None]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("prompt", kind) for kind in (*TASK_TYPES, "mpnet", "deberta")] + [("prefix", kind) for kind in TASK_TYPES],
)
def test_a_row_means_the_same_beside_a_longer_one(models_dir: Path, method: str, kind: str) -> None:
    model, inputs = built(method, kind, models_dir, prompt_tokens=P).eval(), some_inputs(kind)
    alone = {n: t[1:2] if n == "decoder_input_ids" else t[1:2, :4] for n, t in inputs.items()}
    with torch.no_grad():
        among, one, bare = model(**inputs).logits, model(**alone).logits, base_of(kind, models_dir)(**inputs).logits
    assert among.shape == bare.shape
    torch.testing.assert_close(among[1:2, : one.shape[1]], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_classifier_reads_the_last_token(tmp_path: Path, method: str, kind: str) -> None:
    """On whichever side its rows are padded."""
    tiny_classifier(kind, tmp_path, 2)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    placement = Placement(
        AdapterConfig(method=None, type=method, prompt_tokens=P), task_type="SEQ_CLS", new_modules=[], dtype="fp32",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    model = adapter_type(method).build(base, placement).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    pads = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        for rows in (torch.cat([ids, pads], 1), torch.cat([pads, ids], 1)):
            mask = (rows != 0).long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(input_ids=rows, attention_mask=mask, position_ids=places).logits
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_needed_logits_may_be_as_many_as_a_row_has_places(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the vectors are taken out once."""
    monkeypatch.setattr(needed_logits, "WORTH", 0)
    model, inputs = built("prompt", "llama", models_dir, prompt_tokens=P).eval(), some_inputs("llama")
    shape = inputs["input_ids"].shape
    places = torch.arange(1, 2 * (P + shape[1]), 2)
    assert len(places) == P + shape[1]
    with torch.no_grad():
        whole = model(**inputs).logits
        with needed_logits.needed_logits(model, places, shape):
            few = model(**inputs).logits
    assert few.shape[:2] == (1, len(places))
    torch.testing.assert_close(few[0], whole.flatten(0, 1)[places])


def test_vectors_start_as_tokens(models_dir: Path) -> None:
    """Drawn ones, each once and not the padding, the same from the same generator; or those of a text, repeated."""
    table = base_of("bart", models_dir).get_input_embeddings()
    drawn = drawn_tokens(table, table.num_embeddings - 1, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == sorted({*range(table.num_embeddings)} - {table.padding_idx})
    assert len(drawn_tokens(table, 200, torch.Generator())) == 200
    model = built("prompt", "bart", models_dir, prompt_tokens=P)
    expected = table(drawn_tokens(table, P, torch.Generator().manual_seed(1)))
    assert torch.equal(model.prompt.vectors, expected)
    placement = Placement(
        AdapterConfig(method=None, type="prompt", prompt_tokens=P), task_type="SEQ_2_SEQ_LM", new_modules=[],
        dtype="fp32", generator=torch.Generator(), prompt_ids=[7, 9],
    )  # fmt: skip
    model = adapter_type("prompt").build(base_of("bart", models_dir), placement)
    assert torch.equal(model.prompt.vectors, table(torch.tensor([7, 9, 7])))


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_a_prefix_acts_alike_in_eager_attention(models_dir: Path, kind: str) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model, inputs = built("prefix", kind, models_dir, attention, prompt_tokens=P).eval(), some_inputs(kind)
        with torch.no_grad():
            found.append(model(**inputs).logits)
    assert not torch.allclose(found[0], base_of(kind, models_dir)(**inputs).logits, atol=1e-4)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_eager_attention_of_a_models_own_way_is_refused(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, adapter = PrefixTuning(), AdapterConfig(method=None, type="prefix", prompt_tokens=P)
    told = "model.attention='eager': adapter.type='prefix' cannot put keys before those of .*; set it to sdpa"
    config = AutoConfig.from_pretrained(tiny_model("gpt2", models_dir))
    inputs = {name: tensor[:1] for name, tensor in some_inputs("gpt2").items()}
    for attention, upcast in (("eager", False), ("sdpa", True)):
        config.reorder_and_upcast_attn = upcast
        assert fault_of(own, adapter, AutoModelForCausalLM, config, inputs, attn_implementation=attention) is None
    with pytest.raises(UserError, match=told):
        fault_of(own, adapter, AutoModelForCausalLM, config, inputs, attn_implementation="eager")
    llama = base_of("llama", models_dir, "eager")
    own.check(llama)
    monkeypatch.delattr("transformers.models.llama.modeling_llama.eager_attention_forward")
    with pytest.raises(UserError, match=told):
        own.check(llama)


def test_no_prefix_where_no_logit_depends_on_it(models_dir: Path, tmp_path: Path) -> None:
    """Nothing acts that neither trains nor is saved; what is loaded is what was."""
    name, base = "model.layers.1.self_attn", base_of("llama", models_dir)
    placement = Placement(
        AdapterConfig(method=None, type="prefix", prompt_tokens=P), task_type="CAUSAL_LM", new_modules=[], dtype="fp32",
        generator=torch.Generator(), unreached=[f"{name}.q_proj"],
    )  # fmt: skip
    own = adapter_type("prefix")
    model, inputs = own.build(base, placement).eval(), some_inputs("llama")
    values = {key: param.detach() for key, param in model.named_parameters() if param.requires_grad}
    assert [key for key in values if name in key] == [] and len(values) == 2
    own.save(model, values, tmp_path, base_name="llama")
    loaded = own.load(base_of("llama", models_dir), tmp_path, dtype="fp32").eval()
    slots = [key for key, part in loaded.get_base_model().named_modules() if isinstance(part, Prefix)]
    assert slots == ["model.layers.0.self_attn.prefix"]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


class Unheard(PromptTuning):
    """Vectors that no row gets."""

    def wrapped(self, base: nn.Module, whole_modules: Iterable[str]) -> Any:
        return PlacedModel(base, whole_modules)


class Whole(PromptTuning):
    """Logits of the vectors as well."""

    def wrapped(self, base: nn.Module, whole_modules: Iterable[str]) -> Any:
        class Model(PromptedModel):
            def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
                inputs = kwargs | {"input_ids": input_ids}
                return self.get_base_model()(**self._longer(inputs, self._lead(inputs)))

        return Model(base, whole_modules)


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        (PromptTuning(), None),
        (Unheard(), "no logit depends on prompt_vectors.vectors"),
        (Whole(), "logits of (1, 10, 40) in the place of (1, 7, 40)"),
    ],
)
def test_what_a_trial_finds(models_dir: Path, own: PromptTuning, fault: str | None) -> None:
    config = AutoConfig.from_pretrained(tiny_model("gpt2", models_dir))
    inputs = {name: tensor[:1] for name, tensor in some_inputs("gpt2").items()}
    adapter = AdapterConfig(method=None, type="prompt", prompt_tokens=P)
    assert fault_of(own, adapter, AutoModelForCausalLM, config, inputs) == fault
