"""What of a checkpoint's generation settings an evaluation keeps.

A checkpoint's ``generation_config.json`` is made for its own use: to sample, to return several texts or scores, to
write at least 56 tokens of a news summary, to stop at a phrase. An evaluation asks for one text, the likeliest, of the
task's own length; so what is not listed here is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: Ids of tokens that have a part in every text, and of those that no text may hold.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
BARRED = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
#: How beams are compared; without beams they say nothing.
OF_BEAMS = ("length_penalty", "early_stopping")
#: What makes a text not repeat itself.
OF_REPEATS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
#: The same, kept of encoder-decoders: a decoder alone would also punish what the prompt has said.
OF_OUTPUTS = ("repetition_penalty",)


def kept_settings(found: Mapping[str, Any], *, num_beams: int, is_encoder_decoder: bool) -> dict[str, Any]:
    """Those of a checkpoint's generation settings that decide what a right text is.

    Args:
        found: all of them, by Transformers' names.
        num_beams: of the evaluation.
        is_encoder_decoder: whether the model's output begins after the source, not with it.
    """
    names = [*TOKENS, *FORCED, *BARRED, *OF_REPEATS]
    names += OF_BEAMS if num_beams > 1 else ()
    names += OF_OUTPUTS if is_encoder_decoder else ()
    return {name: found[name] for name in names if found.get(name) is not None}


def unfit(found: Mapping[str, Any], vocabulary: int) -> str | None:
    """The first kept setting that no generation can use, and what it should be; None where there is none.

    Args:
        found: a checkpoint's generation settings, as its file says.
        vocabulary: tokens that the model knows.
    """

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocabulary

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 0

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_id, value))

    rules = {
        **dict.fromkeys(FORCED, (lambda value: is_id(value) or is_ids(value), "a token of the model")),
        **dict.fromkeys(BARRED, (is_ids, "a list of the model's tokens")),
        "bad_words_ids": (
            lambda value: isinstance(value, list) and all(is_ids(word) and word for word in value),
            "a list of lists of the model's tokens",
        ),
        **dict.fromkeys(OF_REPEATS, (is_size, "a whole number from 0 on")),
        "length_penalty": (is_number, "a number"),
        "early_stopping": (lambda value: type(value) is bool or value == "never", "true, false or 'never'"),
        "repetition_penalty": (lambda value: is_number(value) and value > 0, "a number above 0"),
    }
    for name, (is_fit, rule) in rules.items():
        if found.get(name) is not None and not is_fit(found[name]):
            return f"{name}={str(found[name])[:60]} must be {rule}"
    barred = set(found.get("suppress_tokens") or ())
    for name in FORCED:
        forced = found.get(name)
        ids = set(forced) if isinstance(forced, list) else {forced} - {None}
        if ids and ids <= barred:
            return f"{name}={forced} must be a token that suppress_tokens leaves"
    return None
