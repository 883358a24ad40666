"""Masks are the same whether a model looks at its padding or is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.tiny import VOCAB
from tests.zoo import CONFIGS, DECODER
from tsqlora_scale.tasks.known_padding import known_padding, padding_of

WINDOWED: dict[str, Any] = {
    "mistral": lambda: t.MistralConfig(**DECODER, sliding_window=3),
    "gemma2": lambda: t.Gemma2Config(**DECODER, head_dim=8, sliding_window=3),
}
KINDS = [
    *WINDOWED,
    "llama",
    "gemma3",
    "gpt2",
    "opt",
    "bloom",
    "mixtral",
    "jamba",
    "mamba",
    "bart",
    "t5",
    "mbart",
    "led",
]
CLASSIFIERS = ["bert", "roberta", "electra", "bart", "gpt2", "llama", "roformer"]
LENGTHS = (8, 5, 3)


def batch(is_encoder_decoder: bool, lengths: tuple[int, ...], target: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": torch.randint(5, VOCAB - 5, (3, 8)) * mask, "attention_mask": mask}
    if is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, VOCAB - 5, (3, target))
    return inputs


def logits(model: Any, inputs: dict[str, torch.Tensor], padding: Any) -> torch.Tensor:
    with torch.no_grad(), known_padding(padding, inputs["attention_mask"].shape):
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens(kind: str, lengths: tuple[int, ...]) -> None:
    model_config = (WINDOWED | CONFIGS)[kind]()
    torch.manual_seed(1)
    both = model_config.is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if both else AutoModelForCausalLM).from_config(model_config).eval()
    for target in (8, 6) if both else (8,):  # as wide as the source, and not
        inputs = batch(both, lengths, target)
        padding = padding_of(inputs, looks_back=True)
        assert padding == ("source" if both else "none" if lengths == (8, 8, 8) else "after")
        inside = torch.ones(3, target, dtype=torch.bool) if both else inputs["attention_mask"].bool()
        found, wanted = (logits(model, inputs, which)[inside] for which in (padding, None))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classes(kind: str, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[kind]()).eval()
    inputs = batch(False, lengths, 0)
    inputs["input_ids"][:, 0] = 7
    for row, length in enumerate(lengths):
        inputs["input_ids"][row, length - 1] = 2  # as many ends in every row, as BART wants
    padding = padding_of(inputs, looks_back=False)
    assert padding == ("none" if lengths == (8, 8, 8) else "some")
    assert torch.equal(logits(model, inputs, padding), logits(model, inputs, None))


def test_nothing_is_known_of_several_masks_nor_of_none() -> None:
    inputs = batch(True, LENGTHS, 4)
    assert padding_of({**inputs, "decoder_attention_mask": torch.ones(3, 4)}, looks_back=False) is None
    assert padding_of({"input_ids": inputs["input_ids"]}, looks_back=True) is None


def test_the_library_is_as_it_was_afterwards() -> None:
    from transformers import masking_utils

    before = dict(vars(masking_utils))

    def fail() -> None:
        with known_padding("some", torch.Size([1, 2])):
            assert vars(masking_utils) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(masking_utils) == before
