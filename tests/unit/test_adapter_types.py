"""The types that are not PEFT's: their modules by the letter, where they stand, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, ModernBertConfig

from tests import zoo
from tests.placed import base_of, built, some_inputs
from tests.reference import adapters as reference
from tests.runs import go
from tests.tiny import AUTO, tiny_model
from tests.unit.config_trees import tree as config_tree
from tests.unit.quality.toys import RandomPool
from tsqlora_scale.api import evaluate
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.adapter_type import adapter_type, check_sizes, own_type
from tsqlora_scale.model.adapters.bitfit import BitFitAdapter, bias_names
from tsqlora_scale.model.adapters.bottleneck import Bottleneck
from tsqlora_scale.model.adapters.data_start import LeadingInputs
from tsqlora_scale.model.adapters.lora import has_factors, lora_config_of, lora_layers
from tsqlora_scale.model.adapters.loratrf import check_filters
from tsqlora_scale.model.adapters.placed_model import make_float32
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.task_filter import TaskFilter
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.model.blocks import block_names, outputs
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.model.weight_files import layer_scalings
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.ranks import start_with_ranks
from tsqlora_scale.run.build import give
from tsqlora_scale.run.initial_adapter import start_from

OWN = ["bitfit", "houlsby", "pfeiffer", "full"]
PLACED = ["loratrf", "houlsby", "pfeiffer"]


def shaken(model: nn.Module) -> None:
    """No parameter that trains at its start, where half of them are zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, param in sorted(model.named_parameters()):
            if param.requires_grad:
                param.add_(torch.empty(param.shape).normal_(0, 0.3, generator=generator))


def written(method: str, model: Any, folder: Path, **changes: Any) -> Path:
    """The model's adapter in a folder, some keys of its description changed."""
    values = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    kind, description = adapter_type(method), folder / "adapter_config.json"
    kind.save(model, values | kind.untrained(model), folder, base_name="base")
    description.write_text(json.dumps(json.loads(description.read_text()) | changes))
    return folder


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**30), size=st.integers(1, 9), rank=st.integers(1, 5), scale=st.sampled_from([0, 1e-3, 1, 50])
)
def test_filter_by_the_letter(seed: int, size: int, rank: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    part = TaskFilter(size, rank, generator)
    hidden = torch.empty(2, 3, size).normal_(generator=generator) * scale
    assert torch.equal(part(hidden), hidden), "at the start it does nothing"
    part.up.weight.data.normal_(generator=generator)
    expected = reference.task_filter(hidden, part.task, part.down.weight, part.up.weight)
    torch.testing.assert_close(part(hidden).double(), expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**30), size=st.integers(1, 9), width=st.integers(1, 5), act=st.sampled_from(["gelu", "relu"])
)
def test_bottleneck_by_the_letter(seed: int, size: int, width: int, act: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    part = Bottleneck(size, width, getattr(nn.functional, act), generator)
    hidden = torch.empty(2, 3, size).normal_(generator=generator)
    assert torch.equal(part(hidden), hidden)
    shaken(part)
    down, up = ((layer.weight, layer.bias) for layer in (part.down, part.up))
    expected = reference.bottleneck(hidden, down, up, act)
    torch.testing.assert_close(part(hidden).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["deberta", "bart", "llama", "gpt2"])
@pytest.mark.parametrize("method", PLACED)
def test_a_model_with_the_modules_is_the_base_with_them_at_their_places(
    models_dir: Path, method: str, kind: str
) -> None:
    """The same logits as from a bare base (merged, where LoRA's layers are) in which the slow versions stand."""
    base, model = base_of(kind, models_dir), built(method, kind, models_dir)
    inputs = some_inputs(kind)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, base(**inputs).logits, atol=1e-6), "at the start it is the base"
    shaken(model)
    found = model(**inputs).logits
    plain = copy.deepcopy(model.get_base_model())
    places: dict[str, Any] = {}
    for name, part in list(plain.named_modules()):
        if isinstance(part, TaskFilter | Bottleneck):
            places[name.rpartition(".")[0]] = part
    assert set(places) == expected_places(method, base)
    for name, part in places.items():
        owner = plain.get_submodule(name)
        owner._forward_hooks.clear()
        owner.register_forward_hook(slow(part, "gelu" if method == "houlsby" else "relu"))
    torch.testing.assert_close(plain(**inputs).logits, found, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert (found - base(**inputs).logits).abs().max() > 1e-2


def expected_places(method: str, base: Any) -> set[str]:
    if method == "loratrf":
        return set(block_names(base))
    attention, feed_forward = outputs(base)
    return {*feed_forward, *(attention if method == "houlsby" else [])}


def slow(part: Any, act: str) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(part, TaskFilter):
            changed = reference.task_filter(first, part.task, part.down.weight, part.up.weight)
        else:
            layers = ((layer.weight, layer.bias) for layer in (part.down, part.up))
            changed = reference.bottleneck(first, *layers, act)
        changed = changed.to(first.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


#: kind -> ends of the names of the layers that attention, and those that feed-forward blocks end in, of one block each
ENDS = {
    "bert": (["attention.output.dense"], ["output.dense"]),
    "mpnet": (["attention.attn.o"], ["output.dense"]),
    "deberta": (["attention.output.dense"], ["output.dense"]),
    "bart": (["self_attn.out_proj", "encoder_attn.out_proj"], ["fc2"]),
    "t5": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"]),
    "llama": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "gpt2": (["attn.c_proj"], ["mlp.c_proj"]),
}
#: kind -> ends of the names of LoRATRF's choice
PAPERS = {
    "bert": ["self.value", "intermediate.dense", "output.dense"],
    "deberta": ["self.value_proj", "intermediate.dense", "output.dense"],
    "bart": ["self_attn.v_proj", "encoder_attn.v_proj", "fc1", "fc2"],
    "t5": ["SelfAttention.v", "EncDecAttention.v", "wi_0", "wi_1", "wo"],
    "llama": ["self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


@pytest.mark.parametrize("kind", ENDS)
def test_where_attention_and_feed_forward_end(models_dir: Path, kind: str) -> None:
    model = bare(kind, models_dir)
    for found, ends in zip(outputs(model), ENDS[kind], strict=True):
        assert {next((end for end in ends if name.endswith(end)), name) for name in found} == set(ends)
    blocks = block_names(model)
    assert len(blocks) == (4 if kind in ("bart", "t5") else 2)
    assert len(outputs(model)[1]) == len(blocks)
    assert not any("attention" in name for name in outputs(model)[1])


@pytest.mark.parametrize("kind", PAPERS)
def test_loratrfs_choice_of_layers(models_dir: Path, kind: str) -> None:
    chosen = resolve_targets(bare(kind, models_dir), "loratrf")
    assert {next((end for end in PAPERS[kind] if name.endswith(f".{end}")), name) for name in chosen} == set(
        PAPERS[kind]
    )
    assert not any(name.endswith("attention.output.dense") for name in chosen)


def bare(kind: str, models: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(tiny_model(kind, models), num_labels=2)
    return skeleton(AUTO.get(kind, AutoModelForSequenceClassification), config)


def test_the_papers_count_of_parameters() -> None:
    """Table 1 of 2412.09827: 0.88M are LoRA's factors at r = 8 on DeBERTaV3-base; filters at their rank come on top."""
    from transformers import DebertaV2Config

    config = DebertaV2Config(
        vocab_size=128, hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_labels=2
    )
    model = skeleton(AutoModelForSequenceClassification, config)
    shapes = [model.get_submodule(name).weight.shape for name in resolve_targets(model, "loratrf")]
    assert round(8 * sum(sum(shape) for shape in shapes) / 1e6, 2) == 0.88
    everywhere = [model.get_submodule(name).weight.shape for name in resolve_targets(model, "auto")]
    assert round(8 * sum(sum(shape) for shape in everywhere) / 1e6, 2) == 1.33


@pytest.mark.parametrize("method", OWN)
def test_what_trains(models_dir: Path, method: str) -> None:
    model = built(method, "deberta", models_dir)
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    own = {name for name in trained if not name.startswith("classifier.")}
    everything = {name for name, _ in base_of("deberta", models_dir).named_parameters()}
    assert {"classifier.weight", "classifier.bias"} <= trained
    if method == "bitfit":
        assert own == {name for name in everything if name.endswith(".bias") and not name.startswith("classifier.")}
    elif method == "full":
        assert trained == everything
    else:
        assert own
        assert all(".bottleneck." in name for name in own)
    assert adapter_type(method).heads(model) == {f"base_model.model.classifier.{part}" for part in ("weight", "bias")}
    assert all(param.dtype == torch.float32 for param in model.parameters() if param.requires_grad)


def test_tied_weights_stay_tied(models_dir: Path) -> None:
    base = base_of("gpt2", models_dir).to(torch.bfloat16)
    placement = Placement(
        AdapterConfig(method=None, type="full"), task_type="CAUSAL_LM", new_modules=[], dtype="bf16",
        generator=torch.Generator(),
    )  # fmt: skip
    model = adapter_type("full").build(base, placement)
    assert base.lm_head.weight is base.transformer.wte.weight
    assert base.lm_head.weight.dtype == torch.float32
    assert model(**some_inputs("gpt2")).logits.isfinite().all()


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "loratrf"])
@pytest.mark.parametrize("kind", ["deberta", "llama"])
def test_gradients_by_sample_are_exact(models_dir: Path, method: str, kind: str) -> None:
    model, pool = built(method, kind, models_dir), RandomPool(kind, 4)
    shaken(model)
    model.eval()
    theta = adapter_type(method).theta(model)
    assert theta
    with PerSampleGradients(model, theta) as gradients:
        _, found = gradients.per_sample(pool.losses, pool.batch(np.arange(4)))
    params = dict(model.named_parameters())
    names = sorted(name for name in params if name.rpartition(".")[0] in theta)
    assert sorted(found) == names
    for row, sample in enumerate(pool.singles()):
        expected = torch.autograd.grad(pool.losses(model, sample)[0].sum(), [params[name] for name in names])
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for name, gradient in zip(names, expected, strict=True):
            assert (found[name][row] - gradient).abs().max() <= 1e-5 * scale, name


def test_own_types_are_those_with_a_file_of_their_own() -> None:
    assert [name for name in (*OWN, "loratrf", "lora", "dora") if own_type(name) is not None] == OWN


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_factors_taken_out_of_weights(models_dir: Path, tmp_path: Path, init: str, kind: str) -> None:
    """PEFT's factors up to sign, the base's logits at the start, and a file for the base as it was."""
    from peft import LoraConfig, get_peft_model

    base, model, inputs = base_of(kind, models_dir), built("lora", kind, models_dir, init=init), some_inputs(kind)
    logits = base(**inputs).logits
    targets = sorted(model.peft_config["default"].target_modules)
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=init)
    )
    own = dict(model.named_modules())
    for name, part in theirs.named_modules():
        if hasattr(part, "lora_A") and (kind, init) != ("gpt2", "olora"):  # which PEFT takes the other way round
            products = [one.lora_B["default"].weight @ one.lora_A["default"].weight for one in (part, own[name])]
            torch.testing.assert_close(*products, atol=1e-5, rtol=1e-4)
            weights = [one.get_base_layer().weight for one in (part, own[name])]
            torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)
    if kind == "gpt2":  # no new head
        torch.testing.assert_close(model.eval()(**inputs).logits, logits, atol=1e-5, rtol=1e-4)
    shaken(model)
    opened = PeftModel.from_pretrained(base, str(written("lora", model, tmp_path))).eval()
    torch.testing.assert_close(opened(**inputs).logits, model.eval()(**inputs).logits, atol=2e-5, rtol=1e-4)


def test_rslora_that_starts_in_weights_scales_by_its_files_ranks(models_dir: Path, tmp_path: Path) -> None:
    """Which are twice those that were trained; so that it can be scored by, and gone on from."""
    base, inputs = base_of("bert", models_dir), some_inputs("bert")
    model = built("rslora", "bert", models_dir, init="pissa")
    shaken(model)
    folder = written("rslora", model, tmp_path)
    assert all(scaling == pytest.approx(16 / 8**0.5) for scaling in layer_scalings(folder).values())
    opened = PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(opened(**inputs).logits, model.eval()(**inputs).logits, atol=2e-5, rtol=1e-4)
    ranks, _ = adapter_type("rslora").read(built("rslora", "bert", models_dir), folder)
    assert set(ranks.values()) == {8}


def test_directions_of_inputs_are_the_leading_ones(models_dir: Path) -> None:
    """Principal components of all inputs together, and PEFT's own; orthonormal, the leading one first."""
    from peft.utils.incremental_pca import IncrementalPCA

    model = built("lora", "bert", models_dir, init="eva").eval()
    layers = lora_layers(model)
    inputs = [
        {"input_ids": torch.randint(5, 30, (1, 4 + i), generator=torch.Generator().manual_seed(i))} for i in range(9)
    ]
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def one_pass() -> None:
        with torch.no_grad():
            for one in inputs:
                model(**one)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: kept[name].append(args[0].flatten(0, 1).double()))
        for name, layer in layers.items()
    ]
    one_pass()
    for handle in handles:
        handle.remove()
    found = LeadingInputs(layers, 4, torch.Generator().manual_seed(0)).find(one_pass)
    assert found.keys() == layers.keys()
    for name, vectors in found.items():
        x = torch.cat(kept[name])
        pca = IncrementalPCA(n_components=4)
        pca.partial_fit(x)
        x = x - x.mean(0)
        best = torch.linalg.svdvals(x)[:4].square()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(4), atol=1e-5, rtol=0)
        energy = (x @ vectors.double().T).square().sum(0)
        assert energy.sum() >= 0.999 * best.sum(), name
        assert energy[0] >= 0.999 * best[0], name
        of_peft = (x @ pca.components_.double().T).square().sum(0)
        torch.testing.assert_close(energy, of_peft, rtol=2e-2, atol=1e-6)


def test_a_block_with_nothing_to_train_is_named(models_dir: Path) -> None:
    model = base_of("bert", models_dir)
    upper = {name for name in BitFitAdapter().chosen(model, ()) if "layer.1." in name}
    assert BitFitAdapter().in_blocks(model, upper, [1]) == upper
    with pytest.raises(UserError, match=r"adapter.layers='top:2': bert.encoder.layer.0 has nothing that adapter.type="):
        BitFitAdapter().in_blocks(model, upper, "top:2")


def test_bitfit_of_a_model_whose_head_alone_has_biases(tmp_path: Path) -> None:
    config = ModernBertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    bare = skeleton(AutoModelForSequenceClassification, config)
    assert any(name.endswith("bias") for name, _ in bare.named_parameters())
    with pytest.raises(UserError, match="a modernbert model has no biases"):
        adapter_type("bitfit").check(bare)  # type: ignore[attr-defined]


def test_a_filter_stands_behind_blocks_that_texts_pass_through(tmp_path: Path, models_dir: Path) -> None:
    """Not behind those of a tower for pictures, whose parameters would never have a gradient."""
    tree = zoo.tree_of("gemma3", tmp_path, models_dir, adapter={"method": "loratrf", "target_modules": "auto"})
    run = go(tree)
    names = [name for name, part in run.engine.module.named_modules() if isinstance(part, TaskFilter)]
    assert len(names) == 2
    assert not any("vision" in name for name in names)
    folder = tmp_path / "runs" / "run" / "adapter"
    expected = run.evaluate()
    assert evaluate(parse_config(tree), folder) == expected
    check_filters(folder, run.engine.module.get_base_model())
    values = load_file(folder / "adapter_model.safetensors")
    cut = {name: value for name, value in values.items() if ".layers.1." not in name}
    save_file(cut, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is missing, for this model it is"):
        check_filters(folder, run.engine.module.get_base_model())


@pytest.mark.parametrize(("kind", "other"), [("dora", "lora"), ("dora", "svd"), ("lora", "dora")])
def test_magnitudes_are_neither_left_behind_nor_made_up(
    models_dir: Path, tmp_path: Path, kind: str, other: str
) -> None:
    folder = written(kind, built(kind, "bert", models_dir), tmp_path)
    check_sizes(folder, AdapterConfig(method=None, type=kind))
    with pytest.raises(UserError, match="magnitudes"):
        check_sizes(folder, AdapterConfig(method=None, type=other))
    with pytest.raises(UserError, match="magnitudes"):
        adapter_type(other).read(built(other, "bert", models_dir), folder)


def test_scalings_are_found_by_ends_of_names(models_dir: Path, tmp_path: Path) -> None:
    """By PEFT's rule, as whoever opens the adapter does."""
    model = built("lora", "bert", models_dir)  # alpha 16, rank 4
    every = {"lora_alpha": 32, "alpha_pattern": {"(query|key|value|dense)": 16}}
    ranks, _ = adapter_type("lora").read(model, written("lora", model, tmp_path, **every))
    assert set(ranks.values()) == {4}
    folder = written("lora", model, tmp_path, lora_alpha=16, alpha_pattern={"query": 32})
    with pytest.raises(UserError, match=r"layer\.0\.attention\.self\.query by 8, .* say 4"):
        adapter_type("lora").read(model, folder)


def test_rslora_scales_by_the_rank_that_a_layer_starts_with(models_dir: Path, tmp_path: Path) -> None:
    """So does who opens the file, and a model that takes up its ranks and values, as a resumed run does."""

    def scalings(model: Any) -> dict[str, float]:
        return {name: layer.scaling["default"] for name, layer in lora_layers(model).items() if has_factors(layer)}

    model, fresh, inputs = built("rslora", "bert", models_dir), built("rslora", "bert", models_dir), some_inputs("bert")
    ranks = {name: place % 4 for place, name in enumerate(lora_layers(model))}
    start_with_ranks(model, ranks, seed=0)
    expected = {name: 16 / rank**0.5 for name, rank in ranks.items() if rank}
    assert scalings(model) == pytest.approx(expected)
    shaken(model)
    folder = written("rslora", model, tmp_path)
    give(fresh, *adapter_type("rslora").read(fresh, folder))
    opened = PeftModel.from_pretrained(base_of("bert", models_dir), str(folder))
    for other in (fresh, opened):
        assert scalings(other) == pytest.approx(expected)
        torch.testing.assert_close(other.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_trained_head_that_is_left_behind_is_told_of(
    models_dir: Path, tmp_path: Path, method: str, trained: bool
) -> None:
    source = built(method, "bert", models_dir)
    if trained:
        shaken(source)
    folder = written(method, source, tmp_path)
    keys = {"adapter__method": method, "adapter__init_from": str(folder), "adapter__train_head": False}
    lines = start_from(built(method, "bert", models_dir, train_head=False), parse_config(config_tree(**keys)))
    told = (
        f"adapter.init_from={str(folder)!r}: its trained head is left behind, as adapter.train_head=false keeps that "
        "of model.name_or_path='some/model'"
    )
    assert lines == ([told] if trained else [])


def test_peft_is_not_asked_for_what_is_loratrfs_own(models_dir: Path, tmp_path: Path) -> None:
    folder = written("loratrf", built("loratrf", "bert", models_dir), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        assert lora_config_of(folder).r == 4


def test_what_is_sharded_has_the_shape_that_it_has_whole() -> None:
    """A matrix that is called a bias (XLNet) trains on no engine, and no weight counts as a norm's vector."""
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    layer.r_w_bias = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    layer.weight.requires_grad_(False)
    layer.r_w_bias.requires_grad_(False)
    for param in layer.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0, dtype=param.dtype)  # type: ignore[attr-defined]
    assert bias_names(layer) == {"bias"}
    make_float32(layer)
    assert (layer.bias.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
