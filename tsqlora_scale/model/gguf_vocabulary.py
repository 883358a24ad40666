"""A tokenizer as GGUF files describe one: which of llama.cpp's tokenizers it is, its tokens and what kind each is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

_GPT2_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How a byte-level vocabulary splits texts first -> what llama.cpp calls it (``tokenizer.ggml.pre``).
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_GPT2_END}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}|{_GPT2_END}": "qwen2",
    _TEKKEN: "tekken",
}
_SERVED = "byte-level BPE as of Llama 3, Qwen 2 and 3, SmolLM, GPT-2 and Mistral's Tekken, and Llama 2's"
#: ``gguf.TokenType``, which is not imported for this.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece's BPE).
        pre: how texts are split first.
        tokens: as many as the model has rows.
        kinds: of each, ``gguf.TokenType``.
        scores: of each, in the order of merges; of ``llama`` alone.
        space_prefix: whether a space is put before a text; of ``llama`` alone.
        adds: whether ``bos`` and ``eos`` are put around a text.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    space_prefix: bool
    adds: dict[str, bool]


def vocabulary_of(tokenizer: Any, size: int, *, key: str) -> Vocabulary:
    """A tokenizer of Transformers in GGUF's terms.

    Args:
        size: rows of the model's embedding; tokens beyond them are left out, rows without a token are named.
        key: what to name in an error.

    Raises:
        UserError: one that llama.cpp has no equal of, or that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"--format gguf: {key}: its tokenizer has no tokenizer.json; those served are {_SERVED}")
    described = json.loads(backend.to_str())
    kind = described["model"].get("type")
    splits = described.get("pre_tokenizer")
    if kind == "BPE" and described["model"].get("byte_fallback"):
        model, pre = "llama", "default"
    elif kind == "BPE" and (name := _split_name(splits)) is not None and _is_unchanged(described.get("normalizer")):
        model, pre = "gpt2", name
    else:
        splitting = [part.get("type") for part in _parts(splits)]
        raise UserError(
            f"--format gguf: {key}: its tokenizer ({kind}, split by {shown(splitting)}) is none that is served: "
            f"{_SERVED}; export it as merged"
        )
    names = {number: token for token, number in tokenizer.get_vocab().items() if number < size}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    unknown = described["model"].get("unk_token")
    kinds = []
    for number, token in enumerate(tokens):
        if number not in names:
            kinds.append(_UNUSED)
        elif model == "llama" and token == unknown:
            kinds.append(_UNKNOWN)
        elif model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds.append(_BYTE)
        elif number in added:
            kinds.append(_CONTROL if added[number] else _USER_DEFINED)
        else:
            kinds.append(_NORMAL)
    scores = _scores(tokens, described["model"]["merges"]) if model == "llama" else None
    return Vocabulary(model, pre, tokens, kinds, scores, _prefixes_space(described), _added(tokenizer))


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece's: the earlier a token is merged, the higher; what is never merged comes last."""
    order: dict[str, int] = {}
    for place, pair in enumerate(merges):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        order.setdefault(left + right, place)
    return [-float(order.get(token, len(merges) + number)) for number, token in enumerate(tokens)]


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps by which a text is split."""
    if pre_tokenizer is None:
        return []
    found: list[dict[str, Any]] = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return found


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of the way that a byte-level tokenizer splits texts; None of others."""
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    *before, last = parts
    by_words = last.get("use_regex", True)
    if not before:
        return "gpt-2" if by_words else None
    if len(before) > 1:
        return None
    first = before[0]
    if first.get("type") == "Digits" and first.get("individual_digits") and by_words:
        return "smollm"
    if first.get("type") == "Split" and not by_words and first.get("behavior") == "Isolated":
        return _SPLITS.get(str(first.get("pattern", {}).get("Regex")))
    return None


def _is_unchanged(normalizer: dict[str, Any] | None) -> bool:
    """Whether texts are taken as they are; NFC, which Qwen asks for, is what nearly every text is in."""
    return normalizer is None or normalizer.get("type") == "NFC"


def _prefixes_space(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    normalizer = described.get("normalizer") or {}
    steps = [*_parts(described.get("pre_tokenizer")), *normalizer.get("normalizers", [normalizer])]
    spaced = any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return spaced or any(step.get("type") == "Prepend" for step in steps)


def _added(tokenizer: Any) -> dict[str, bool]:
    """What the tokenizer puts around a text, by what it does."""
    ids = tokenizer("a")["input_ids"]
    ends = {"bos": ids[0], "eos": ids[-1]}
    return {name: getattr(tokenizer, f"{name}_token_id") == number for name, number in ends.items()}


def add_vocabulary(writer: Any, vocabulary: Vocabulary, folder: Path) -> None:
    """Put a tokenizer into a GGUF file.

    Args:
        writer: ``gguf.GGUFWriter``.
        folder: with the tokenizer's files, for merges, special tokens and the chat template.
    """
    import gguf

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    special.add_special_token.update(vocabulary.adds)
    special.add_to_gguf(writer, quiet=True)
