"""Mixtures of experts that are linear layers each: all are adapted alike, and several processes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as t

from tests import zoo
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.lora import lora_layers
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run, check_engine
from tsqlora_scale.training import train_to_the_end

SIZES: dict[str, Any] = {
    "vocab_size": zoo.DECODER["vocab_size"], "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 16, "expert_capacity": 64,
}  # fmt: skip


@pytest.fixture
def switch(tmp_path: Path, models_dir: Path) -> Iterator[dict[str, Any]]:
    """A run on a small Switch Transformer of sixteen experts, of which a text of twelve tokens misses some."""
    zoo.CONFIGS["switch"] = lambda: t.SwitchTransformersConfig(**SIZES)
    try:
        yield zoo.tree_of("switch", tmp_path, models_dir, form="seq2seq")
    finally:
        del zoo.CONFIGS["switch"]


def checked(tree: dict[str, Any], **adapter: Any) -> preflight.Preflight:
    return preflight.check(parse_config(tree | {"adapter": tree["adapter"] | adapter}))


def test_no_expert_is_left_out(switch: dict[str, Any]) -> None:
    found = checked(switch, target_modules=["wi", "wo"])
    assert len(found.findings.experts) == 2 * 2 * 16
    assert found.findings.trains_experts
    assert not found.findings.experts & found.findings.unreached
    adapted = {name.removeprefix("base_model.model.") for name in lora_layers(build_run(found).engine.module)}
    assert found.findings.experts <= adapted


def test_several_processes(switch: dict[str, Any]) -> None:
    experts, attention = checked(switch, target_modules=["wi", "wo"]), checked(switch, target_modules=["q", "v"])
    check_engine(experts, sharded=False, processes=1)
    check_engine(attention, sharded=False, processes=2)
    for found, sharded, words in (
        (experts, False, "needs a gradient on every rank; run one process, or leave the experts out"),
        (experts, True, "gather a layer where it is called; use DDP or ZeRO-2, and leave the experts out"),
        (attention, True, "gather a layer where it is called"),
    ):
        with pytest.raises(UserError, match=r"experts that are layers of their own \(.*experts.expert_") as caught:
            check_engine(found, sharded=sharded, processes=2)
        assert words in str(caught.value)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_no_bottleneck_stands_behind_one_of_many_experts(method: str, switch: dict[str, Any]) -> None:
    switch["adapter"] = {"method": method}
    with pytest.raises(UserError, match="feed-forward blocks of a switch_transformers model are experts"):
        preflight.check(parse_config(switch))


def test_every_expert_counts_the_same_steps(switch: dict[str, Any]) -> None:
    """An expert that no text was sent to has no gradient, and one step count goes into a checkpoint for all."""
    run = build_run(checked(switch, target_modules=["wi", "wo"]))
    train_to_the_end(run)
    optimizer: Any = run.engine._optimizer.optimizer  # type: ignore[attr-defined]
    trained = [param for param in run.engine.module.parameters() if param.requires_grad]
    assert {int(optimizer.state[param]["step"]) for param in trained} == {2}
