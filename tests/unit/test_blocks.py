"""Blocks by names, learning rates by depth, and the choice of layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    FunnelBaseModel,
    FunnelConfig,
    OPTConfig,
    OPTForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from tests.runs import go, losses_of, run_tree
from tests.steps import take_step
from tests.tiny import CONFIGS
from tests.unit.config_trees import message, tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.base_engine import lr_groups
from tsqlora_scale.model.adapters.lora import lora_layers, short_name
from tsqlora_scale.model.adapters.placed_model import PlacedModel
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.model.block_depths import block_of, blocks_of, check_depth, lr_scales
from tsqlora_scale.model.blocks import block_names
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

BLOCKS = {
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "deberta": ["deberta.encoder.layer.0", "deberta.encoder.layer.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "bart": [f"model.{half}.layers.{number}" for half in ("encoder", "decoder") for number in (0, 1)],
    "t5": [f"{half}.block.{number}" for half in ("encoder", "decoder") for number in (0, 1)],
}
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM} | dict.fromkeys(
    ("bart", "t5"), AutoModelForSeq2SeqLM
)


def bare(kind: str) -> nn.Module:
    return skeleton(AUTO.get(kind, AutoModelForSequenceClassification), CONFIGS[kind]())


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_from_the_bottom_to_the_top(kind: str) -> None:
    assert blocks_of(bare(kind)) == BLOCKS[kind]


def test_several_numbers_in_a_row_are_one_block() -> None:
    assert block_of("funnel.encoder.blocks.0.3.attention.q_head") == "funnel.encoder.blocks.0.3"
    assert block_of("base_model.model.model.layers.3.mlp.experts.7.up.lora_A.default.weight") == "model.layers.3"
    assert block_of("base_model.model.classifier.modules_to_save.default.0.weight") is None
    assert block_of("bert.embeddings.word_embeddings.weight") is None


def test_blocks_that_are_numbered_within_their_size() -> None:
    """Each is a block of its own, behind which a filter stands."""
    sizes: dict[str, Any] = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "vocab_size": 40}
    model = FunnelBaseModel(FunnelConfig(block_sizes=[2, 1], **sizes))
    assert block_names(model) == ["encoder.blocks.0.0", "encoder.blocks.0.1", "encoder.blocks.1.0"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_depths_when_everything_trains(kind: str) -> None:
    """Embeddings lowest, each block the factor times the one above it, the head and the uppermost block highest."""
    model, count = bare(kind), len(BLOCKS[kind])
    scales = lr_scales(model.requires_grad_(True), 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        inside = [number for number, block in enumerate(BLOCKS[kind]) if name.startswith(f"{block}.")]
        if inside:
            assert scale == 0.5 ** (count - 1 - inside[0]), name
        elif re.search("embed|shared|wte|wpe", name):
            assert scale == 0.5**count, name
        elif re.search("classifier|lm_head|decoder.final|model.norm|ln_f", name):
            assert scale == 1.0, name


OPT = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "vocab_size": 40, "word_embed_proj_dim": 8}
GEMMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
         "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), [
    (lambda: OPTForCausalLM(OPTConfig(num_hidden_layers=4, **OPT)),
     {"decoder.final_layer_norm.weight": 1.0, "decoder.project_out.weight": 1.0, "embed_tokens": 0.5**4,
      "layers.0.": 0.5**3, "layers.3.": 1.0}),
    (lambda: T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=40)),
     {"encoder.norm.weight": 0.25, "decoder.norm.weight": 1.0, "encoder.embed_tokens": 0.5**4}),
])  # fmt: skip
def test_a_last_norm_goes_with_the_last_block_of_its_stack(
    model: Callable[[], nn.Module], expected: dict[str, float]
) -> None:
    """Also where it is registered before the blocks."""
    scales = lr_scales(PlacedModel(model().requires_grad_(True)), 0.5)
    for part, scale in expected.items():
        found = {name: value for name, value in scales.items() if part in name}
        assert found and set(found.values()) == {scale}, part


@given(st.lists(st.sampled_from([1.0, 0.9, 0.81]), min_size=1, max_size=6))
def test_groups_hold_every_parameter_once(scales: list[float]) -> None:
    named = {str(number): nn.Parameter(torch.zeros(1)) for number in range(len(scales))}
    groups = lr_groups(named, {str(number): scale for number, scale in enumerate(scales)})
    assert [group["lr_scale"] for group in groups] == sorted(set(scales), reverse=True)
    found = {id(param): group["lr_scale"] for group in groups for param in group["params"]}
    assert found == {id(param): scales[int(name)] for name, param in named.items()}
    assert sum(len(group["params"]) for group in groups) == len(named)


def test_first_steps_are_as_long_as_the_depth_says(tmp_path: Path, models_dir: Path) -> None:
    """Adam's first step is the learning rate in every element that has a gradient."""
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run", train={"lr_decay": 0.5, "eps": 1e-20}))
    run = build_run(preflight.check(config))
    before = run.engine.gather().params
    take_step(run)
    after = run.engine.gather().params
    moved = {name: (after[name].value - entry.value).abs().max().item() for name, entry in before.items()}
    for name, step in moved.items():
        if ".lora_A." in name:  # B is zero at first, and A's gradient with it
            continue
        assert step == pytest.approx(1e-2 * (0.5 if "layer.0." in name else 1.0), rel=1e-3), name
    assert any("classifier" in name for name in moved)


def test_groups_follow_rank_events_and_a_resume(tmp_path: Path, models_dir: Path) -> None:
    train = {"lr_decay": 0.5, "checkpoint_every": 6, "checkpoint_keep": 9}
    whole = run_tree("bert", tmp_path, models_dir, "whole", train=train, allocation={"r_min": 0})
    run = go(whole)
    groups = run.engine._optimizer.param_groups  # type: ignore[attr-defined]
    names = {id(param): name for name, param in run.engine.module.named_parameters()}
    found = {names[id(param)]: group["lr_scale"] for group in groups for param in group["params"]}
    assert found == lr_scales(run.engine.module, 0.5)
    again = run_tree("bert", tmp_path, models_dir, "again", train=train, allocation={"r_min": 0})
    go(again, resume=str(run.record.folder / "checkpoints" / "step-00000006"))
    assert losses_of(tmp_path / "runs" / "again") == losses_of(tmp_path / "runs" / "whole")[6:]


@pytest.mark.parametrize(
    ("layers", "wanted"), [([1], {1}), ([0, 1], {0, 1}), ("top:1", {1}), ("top:2", {0, 1}), (None, {0, 1})]
)
def test_chosen_layers(layers: list[int] | str | None, wanted: set[int]) -> None:
    found = resolve_targets(bare("bert"), "auto", layers=layers)
    assert found == [n for n in resolve_targets(bare("bert"), "auto") if int(n.split(".")[3]) in wanted]


def test_the_top_of_an_encoder_decoder_is_its_decoders() -> None:
    assert {block_of(name) for name in resolve_targets(bare("t5"), "auto", layers="top:1")} == {"decoder.block.1"}
    assert {block_of(name) for name in resolve_targets(bare("t5"), "auto", layers=[1])} == {"encoder.block.1"}


def test_only_chosen_layers_are_adapted_scored_and_resized(tmp_path: Path, models_dir: Path) -> None:
    run = go(run_tree("llama", tmp_path, models_dir, "run", adapter={"r": 4, "alpha": 8, "layers": [1]}))
    assert {short_name(name).split(".")[2] for name in lora_layers(run.engine.module)} == {"1"}
    result = run.kept["ranks"]
    assert len(result) == 7 and len(set(result.values())) > 1


@pytest.mark.parametrize(
    ("layers", "part"),
    [([2], "has no block 2; its blocks are 0"), ("top:3", "has 2 blocks; give top:2"), ([0], "lies in these blocks")],
)
def test_blocks_that_are_not_there(tmp_path: Path, models_dir: Path, layers: list[int] | str, part: str) -> None:
    targets = ["layer.1.output.dense"] if layers == [0] else "auto"
    adapter = {"r": 4, "layers": layers, "target_modules": targets}
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run", adapter=adapter))
    with pytest.raises(UserError, match=part):
        preflight.check(config)


def test_wrong_keys() -> None:
    assert "adapter.layers" in message(tree(adapter__layers="top:0"))
    assert "twice" in message(tree(adapter__layers=[1, 1]))
    assert "train.lr_decay" in message(tree(train__lr_decay=0.0))


def test_a_model_without_blocks_has_no_depths() -> None:
    with pytest.raises(UserError, match="no repeated blocks"):
        check_depth(parse_config(tree(train__lr_decay=0.9)), nn.Linear(2, 2))
