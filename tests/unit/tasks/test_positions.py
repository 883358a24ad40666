"""The most tokens that a model takes, proved by a forward of that many and by an error at one more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.unit.tasks.cases import CLASSES, SUMMARIES, task_config
from tests.unit.tasks.families import FAMILIES, WIDE, build_family, describe_family
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.tasks import check_lengths
from tsqlora_scale.tasks.objectives.positions import position_limits

#: Encoders and decoders -> tokens that a table of 64 leaves.
ONE_SIDED = {
    "bert": 64, "roberta": 63, "xlm-roberta": 63, "mpnet": 62, "esm": 63, "electra": 64, "distilbert": 64, "xlm": 64,
    "longformer": 63, "gpt2": 64, "gpt_neo": 64, "gpt_bigcode": 64, "openai-gpt": 64, "opt": 64, "biogpt": 64,
    "gptj": 64, "codegen": 64, "ctrl": 64, "mpt": 64,
}  # fmt: skip
UNLIMITED = ["deberta-v2", "xlnet", "llama", "mistral", "gpt_neox", "bloom", "falcon", "funnel"]
ROTARY_ESM = {"position_embedding_type": "rotary"}


def runs(model: Any, length: int, **more: torch.Tensor) -> bool:
    """Whether a forward of so many tokens goes through."""
    ids = torch.full((1, length), 5)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", ONE_SIDED)
def test_a_table_of_positions(kind: str) -> None:
    auto = AutoModelForCausalLM if kind == "codegen" else AutoModelForSequenceClassification
    config = describe_family(kind)
    limits = position_limits(skeleton(auto, config))
    assert limits == {"encoder": ONE_SIDED[kind]}
    model = build_family(config, auto)
    assert runs(model, limits["encoder"])
    assert not runs(model, limits["encoder"] + 1)


@pytest.mark.parametrize("kind", UNLIMITED)
def test_positions_without_a_limit(kind: str) -> None:
    config = describe_family(kind, position_biased_input=False)
    assert position_limits(skeleton(AutoModelForSequenceClassification, config)) == {}
    assert runs(build_family(config), 200)


def test_esm_with_rotary_positions() -> None:
    config = describe_family("esm", **ROTARY_ESM)
    assert position_limits(skeleton(AutoModelForSequenceClassification, config)) == {}
    assert runs(build_family(config), 200)


LED = {name: size for name, size in WIDE.items() if name != "max_position_embeddings"} | {
    "max_encoder_position_embeddings": 70, "max_decoder_position_embeddings": 33, "attention_window": 8,
}  # fmt: skip
PAIRS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "bart": (WIDE, {"encoder": 64, "decoder": 64}),
    "mbart": (WIDE, {"encoder": 64, "decoder": 64}),
    "blenderbot": (WIDE, {"encoder": 64, "decoder": 64}),
    "pegasus": (WIDE, {"encoder": 64, "decoder": 64}),
    "marian": (WIDE, {"encoder": 64, "decoder": 64}),
    "led": (LED, {"encoder": 64, "decoder": 33}),
    "m2m_100": (WIDE, {}),
    "t5": (FAMILIES["t5"], {}),
    "mt5": (FAMILIES["t5"], {}),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_encoder_and_decoder_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, expected = PAIRS[kind]
    monkeypatch.setitem(FAMILIES, kind, sizes)
    config = describe_family(kind)
    limits = position_limits(skeleton(AutoModelForSeq2SeqLM, config))
    assert limits == expected
    model = build_family(config, AutoModelForSeq2SeqLM)
    encoder, decoder = limits.get("encoder", 200), limits.get("decoder", 200)
    assert runs(model, encoder, decoder_input_ids=torch.full((1, decoder), 5))
    if limits:
        assert not runs(model, encoder + 1, decoder_input_ids=torch.full((1, 3), 5)) or kind == "led"
        assert not runs(model, 8, decoder_input_ids=torch.full((1, decoder + 1), 5))


@pytest.mark.parametrize(
    ("kind", "auto", "task", "message"),
    [
        ("bert", AutoModelForSequenceClassification, CLASSES | {"max_length": 65}, "task.max_length=65: the model"),
        ("mpnet", AutoModelForSequenceClassification, CLASSES | {"max_length": 63}, "the model takes 62 tokens; lower"),
        ("bart", AutoModelForSequenceClassification, CLASSES | {"max_length": 65}, "task.max_length=65"),
        ("bart", AutoModelForSeq2SeqLM, SUMMARIES | {"max_target_length": 65}, "task.max_target_length=65: the model"),
        ("bart", AutoModelForSeq2SeqLM, SUMMARIES | {"max_length": 65}, "task.max_length=65: the model takes 64"),
        ("gpt2", AutoModelForCausalLM, SUMMARIES | {"type": "causal", "max_length": 65}, "task.max_length=65"),
    ],
)  # fmt: skip
def test_too_long(kind: str, auto: Any, task: dict[str, Any], message: str, tmp_path: Path) -> None:
    bare = skeleton(auto, describe_family(kind))
    with pytest.raises(UserError, match=message):
        check_lengths(task_config(tmp_path, task), bare)
    fitting = {key: value - 1 for key, value in task.items() if key in ("max_length", "max_target_length")}
    check_lengths(task_config(tmp_path, task | fitting), bare)


def test_leds_decoder_is_shorter_than_its_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "led", LED)
    bare = skeleton(AutoModelForSeq2SeqLM, describe_family("led"))
    check_lengths(task_config(tmp_path, SUMMARIES | {"max_length": 64, "max_target_length": 33}), bare)
    with pytest.raises(UserError, match="max_target_length=34: the model takes 33"):
        check_lengths(task_config(tmp_path, SUMMARIES | {"max_length": 64, "max_target_length": 34}), bare)
