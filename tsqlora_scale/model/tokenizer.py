"""A tokenizer and a model's config made to agree: which token fills short rows, and that every token has a row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import AdapterConfig, Config

log = logging.getLogger("tsqlora_scale")

#: Name of the token that is added where no other can fill rows.
_NEW_PAD = "<|pad|>"
#: A character of several scripts that a vocabulary is unlikely to know.
_RARE = "\U0001d356 ꙮ \U0001f600 中"


def fit_tokenizer(config: Config, model_config: Any, tokenizer: Any, *, key: str) -> None:
    """Choose the padding token, and write it into both; see that the model has a row for every token.

    Raises:
        UserError: naming the model.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made of nothing, where files are missing
        raise UserError(f"{key}: its tokenizer knows no words; the model needs the files of its tokenizer, too")
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    _choose_pad(config, model_config, tokenizer, size, key)
    if size is not None:
        _check_rows(tokenizer, size, key)
    for part in _parts(model_config):
        part.pad_token_id = tokenizer.pad_token_id


def _choose_pad(config: Config, model_config: Any, tokenizer: Any, size: int | None, key: str) -> None:
    """Give the tokenizer a padding token that means padding to the model, too.

    Raises:
        UserError: there is none, or a classifier would take the end of a text for padding.
    """
    from tsqlora_scale.tasks import auto_class_of
    from tsqlora_scale.tasks.objectives.model_inputs import counts_positions_from_pads, model_class, pools_by_pads

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise UserError(f"{key}: the tokenizer has neither a padding nor an end token")
    if counts_positions_from_pads(model_config):
        _keep_models_pad(model_config, tokenizer)
        return
    is_judged = config.task.num_labels > 0 and config.task.prompt is None
    if not is_judged or not pools_by_pads(model_class(auto_class_of(config.task), model_config)):
        return
    found = next((token for token in _candidates(tokenizer) if _fills_only(tokenizer, token, size)), None)
    if found is not None:
        tokenizer.pad_token = found
    elif size is not None and len(tokenizer) < size:  # embeddings often have rows to spare
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
    else:
        raise UserError(
            f"{key}: its classifier reads the last token that is no padding, and the tokenizer's padding token "
            f"{shown(tokenizer.pad_token)} also occurs in texts; give the tokenizer a padding token of its own"
        )


def _keep_models_pad(model_config: Any, tokenizer: Any) -> None:
    """Of a model that numbers positions from the padding token on the number cannot change: the tokenizer's does."""
    number = model_config.pad_token_id
    if number is None or number == tokenizer.pad_token_id or number < 0:
        return
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    if token is not None and _fills_only(tokenizer, token, None):
        tokenizer.pad_token = token
    else:
        log.warning(
            "config.json pads with token %d, which the tokenizer has for texts; both now pad with %d, and positions "
            "count from there", number, tokenizer.pad_token_id,
        )  # fmt: skip


def _candidates(tokenizer: Any) -> Iterator[str]:
    """Tokens that may fill rows, the likeliest first: the tokenizer's own, those named so, any other special one."""
    yield tokenizer.pad_token
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    yield from sorted(special, key=lambda name: "pad" not in name.lower())


def _fills_only(tokenizer: Any, token: str, size: int | None) -> bool:
    """Whether a token is never part of a text: a special one, none that is put around texts, none for unknown words."""
    from tsqlora_scale.tasks.objectives.tokenizing import is_mark

    number = tokenizer.convert_tokens_to_ids(token)
    added = tokenizer.added_tokens_decoder.get(number)
    if added is None or added.content != token or not added.special or not is_mark(token):
        return False
    if size is not None and number >= size:
        return False
    try:
        return number not in tokenizer(_RARE)["input_ids"]
    except Exception:  # the tokenizer's own, of a vocabulary without a token for unknown words
        return number not in tokenizer("")["input_ids"]


def _check_rows(tokenizer: Any, size: int, key: str) -> None:
    """Every token that a text can give has a row in the embeddings. Special ones that no text gives need none.

    Raises:
        UserError: naming a token that has none.
    """
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token")
    used = {getattr(tokenizer, f"{name}_id") for name in names} | {*tokenizer("")["input_ids"]}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    beyond = [(n, token) for token, n in tokenizer.get_vocab().items() if n >= size and n not in special]
    if beyond:
        number, token = min(beyond)
        raise UserError(
            f"{key}: its tokenizer has {tokenizer.vocab_size} tokens and pads with number {tokenizer.pad_token_id}; "
            f"its token {shown(token)} is number {number}, and the model knows {size}; give the model's own tokenizer, "
            "or a model whose embeddings have been resized to it"
        )


def _parts(model_config: Any) -> list[Any]:
    """A model's config and those of its text, read and written."""
    from transformers import PretrainedConfig

    sides = [getattr(model_config, side, None) for side in ("encoder", "decoder")]
    text = [model_config.get_text_config(), *(side for side in sides if isinstance(side, PretrainedConfig))]
    return list({id(part): part for part in (model_config, *text)}.values())


def prompt_ids(adapter: AdapterConfig, tokenizer: Any) -> list[int]:
    """The tokens of ``adapter.prompt_text``; none without one.

    Raises:
        UserError: it has none.
    """
    if adapter.prompt_text is None:
        return []
    ids: list[int] = tokenizer(adapter.prompt_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"adapter.prompt_text={adapter.prompt_text!r}: has no tokens; give a text that has some")
    return ids
