"""Generation behind what stands before every text: as whole forwards say, and with the caller's own tokens in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.placed import base_of, built

P = 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_goes_on_as_the_forward_says(models_dir: Path, method: str, kind: str) -> None:
    """With its cache and rows padded on the left, token by token what whole forwards of every row alone choose."""
    model = built(method, kind, models_dir, prompt_tokens=P).eval()
    with torch.no_grad():  # a random model repeats itself
        for name, param in model.named_parameters():
            param.mul_(3 if param.dim() > 1 and "norm" not in name else 1)
    model.get_base_model().generation_config = GenerationConfig()  # as an evaluation sees to it
    two_sides = kind in ("bart", "t5")
    texts = [[5, 6, 7, 8, 9], [11, 12]]
    width = max(map(len, texts))
    pads = [[0] * (width - len(text)) for text in texts]
    ids = torch.tensor([t + p if two_sides else p + t for t, p in zip(texts, pads, strict=True)])
    asked_for = GenerationConfig(
        max_new_tokens=4, num_beams=1, do_sample=False, eos_token_id=None, pad_token_id=0, decoder_start_token_id=2,
        use_cache=True,
    )  # fmt: skip
    found = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), generation_config=asked_for)
    assert two_sides or torch.equal(found[:, :width], ids)
    for text, row in zip(texts, found[:, 1:] if two_sides else found[:, width:], strict=True):
        source, written = torch.tensor([text]), [2] if two_sides else []
        for _ in range(4):
            asked = source if two_sides else torch.tensor([text + written])
            more = {"decoder_input_ids": torch.tensor([written])} if two_sides else {}
            with torch.no_grad():
                logits = model(input_ids=asked, attention_mask=torch.ones_like(asked), **more).logits
            written.append(int(logits[0, -1].argmax()))
        assert row.tolist() == written[int(two_sides) :]


class EndsBySum(StoppingCriteria):
    """Once a row's tokens add up to a multiple of 7."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.sum(1) % 7 == 0


class BansBySum(LogitsProcessor):
    """A token that a row's tokens name."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.scatter(1, input_ids.sum(1, keepdim=True) % scores.shape[1], float("-inf"))


#: what stands behind a row that has ended: the padding, or what beam search has where nothing ends a text
FILLS = (39, -1)
#: what reads or counts tokens while some are generated, each beside a penalty
WAYS: list[dict[str, Any]] = [
    {"max_new_tokens": 6}, {"max_length": 9}, {"max_length": 12, "min_length": 9, "eos_token_id": [*range(5, 30)]},
    {"max_new_tokens": 6, "no_repeat_ngram_size": 1}, {"max_new_tokens": 6, "encoder_repetition_penalty": 1.5},
    {"max_length": 10, "num_beams": 2}, {"max_length": 10, "num_beams": 3, "num_return_sequences": 2},
    {"max_length": 10, "num_beams": 2, "eos_token_id": [*range(5, 16)], "min_length": 7},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_reads_tokens_in_generation_reads_the_callers(models_dir: Path, kind: str) -> None:
    """Of rows padded on the left, with a cache: as of each alone, whose logits are those of whole forwards."""
    model = built("prompt", kind, models_dir, prompt_tokens=P).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.mul_(3 if param.dim() > 1 and "wte" not in name else 1)
    model.get_base_model().generation_config = GenerationConfig()
    slow = base_of(kind, models_dir)
    slow.generation_config = GenerationConfig()
    slow.forward = lambda input_ids, attention_mask=None, **_: model(input_ids=input_ids)
    texts = [[5, 6, 7, 8, 9], [11, 12]]
    ids = torch.tensor([texts[0], [0, 0, 0, *texts[1]]])
    by_the_caller = {
        "stopping_criteria": StoppingCriteriaList([EndsBySum()]),
        "logits_processor": LogitsProcessorList([BansBySum()]),
    }
    ends = 0
    for way in WAYS:
        # padding is a token to what keeps tokens from coming again
        options: dict[str, Any] = {
            "suppress_tokens": [0],
            "repetition_penalty": 1.3,
            "pad_token_id": FILLS[0],
            "do_sample": False,
        } | way
        options |= {} if "eos_token_id" in way else by_the_caller
        both = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), return_dict_in_generate=True, **options)
        found = both.sequences
        assert torch.equal(model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **options), found), (
            "in whichever form"
        )
        count = way.get("num_return_sequences", 1)
        for number, text in enumerate(texts):
            shorter = {
                n: v - (ids.shape[1] - len(text)) for n, v in options.items() if n in ("max_length", "min_length")
            }
            expected = slow.generate(input_ids=torch.tensor([text]), use_cache=False, **options | shorter)
            rows = found[number * count : (number + 1) * count]
            assert torch.equal(rows[:, : ids.shape[1]], ids[number].expand(count, -1))
            for row, one in zip(rows[:, ids.shape[1] :].tolist(), expected[:, len(text) :].tolist(), strict=True):
                while one[-1] in FILLS:
                    one.pop()
                rest = row[len(one) :]
                assert row[: len(one)] == one, way
                # what only a criterion has ended goes on beside others, unless it is a beam
                assert all(token in FILLS for token in rest) or not {"eos_token_id", "num_beams"} & way.keys(), way
                ends += len(rest)
    assert ends, "nothing has ended a row early"
    assert not {name for name in vars(model.get_base_model()) if name.startswith(("_get_logits", "_get_stopping"))}
