"""What every objective asks of a tokenizer: text as text, cut to a length; its own settings are left as they are."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.tasks.objectives.early_cut import head, is_long, tail


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, else the end token (always masked, so any id would do)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def is_mark(token: str) -> bool:
    """Whether a special token is none of the words and characters that texts are made of."""
    return len(token) > 1 and not token.isalpha()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that no text of a user's may be read as: all special ones but the one of unknown words."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {*added, *tokenizer.all_special_ids}
    others = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    known = [number for number in named - ({tokenizer.unk_token_id} - others) if number is not None]
    return frozenset(n for n in known if is_mark(str(tokenizer.convert_ids_to_tokens(n))))


class TextEncoder:
    """A tokenizer by which ``</s>`` in a text is four characters, and which reads no more of a text than is kept.

    ``split_special_tokens`` keeps the added tokens of a fast tokenizer out of a text, but its model may still know
    them as pieces (unigram and word-level vocabularies do). A text that is read as one in spite of it gets a blank
    after the mark's first character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        names = [str(name) for name in tokenizer.convert_ids_to_tokens(sorted(self._special))]
        marks = sorted(map(re.escape, names), key=len, reverse=True)
        self._marks = re.compile("|".join(marks), re.IGNORECASE) if marks else None
        # of a slow tokenizer this would keep a user's own added words out, too
        self._options: dict[str, Any] = {"split_special_tokens": True} if tokenizer.is_fast else {}

    def rows(
        self, texts: list[str], pairs: list[str] | None = None, *, max_length: int, targets: bool = False
    ) -> dict[str, list[list[int]]]:
        """Token ids, masks and segment ids with special tokens, cut to ``max_length``, not yet padded.

        Args:
            targets: tokenise as what a translator writes, not what it reads.
        """
        texts, pairs = self._shortened(texts, pairs, max_length)
        encoded = self._call(texts, pairs, targets, truncation=True, max_length=max_length)
        own = self._count(self._call([""], [""] if pairs else None, targets)["input_ids"][0])
        misread = [i for i, row in enumerate(encoded["input_ids"]) if self._count(row) > own]
        if misread:
            texts, pairs = list(texts), None if pairs is None else list(pairs)
            for column in (texts, pairs or []):
                for i in misread if column else []:
                    column[i] = self.broken(column[i])
            encoded = self._call(texts, pairs, targets, truncation=True, max_length=max_length)
        return encoded

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts alone, without special tokens."""
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False, **self._options}
        ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        misread = [i for i, row in enumerate(ids) if not self._special.isdisjoint(row)]
        if misread:
            again = self._tokenizer([self.broken(texts[i]) for i in misread], **options)["input_ids"]
            for i, row in zip(misread, again, strict=True):
                ids[i] = row
        return ids

    def with_offsets(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text as :meth:`plain` reads it, its marks broken where they have to be, and its tokens' characters."""
        options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = self._tokenizer(text, **options, **self._options)
        if not self._special.isdisjoint(encoded["input_ids"]):
            text = self.broken(text)
            encoded = self._tokenizer(text, **options, **self._options)
        return text, encoded["offset_mapping"]

    def among_marks(self, text: str) -> str:
        """The text as it may stand in one whose marks are read: unchanged unless a mark would be read in it, too."""
        if self._marks is None or not self._marks.search(text):
            return text
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return text if self._special.isdisjoint(ids) else self.broken(text)

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.plain([text])[0])

    def lengths(self, texts: list[str], *, at_most: int) -> list[int]:
        """Tokens of the first ``at_most`` characters of texts."""
        return list(map(len, self.plain([text[:at_most] for text in texts])))

    @property
    def lost_side(self) -> str:
        """What a text that is too long loses by :meth:`rows`."""
        return "end" if self._tokenizer.truncation_side == "right" else "beginning"

    def broken(self, text: str) -> str:
        """The text with a blank in everything that reads like a special token."""
        if self._marks is None:
            return text
        return self._marks.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _shortened(
        self, texts: list[str], pairs: list[str] | None, max_length: int
    ) -> tuple[list[str], list[str] | None]:
        """Without what truncation takes away in any case."""
        cut = head if self._tokenizer.truncation_side == "right" else tail
        if pairs is None:
            if not any(is_long(text, max_length) for text in texts):
                return texts, None
            return [cut(text, max_length, self.length) for text in texts], None
        both = [self._shortened_pair(pair, max_length, cut) for pair in zip(texts, pairs, strict=True)]
        return [first for first, _ in both], [second for _, second in both]

    def _shortened_pair(self, pair: tuple[str, str], max_length: int, cut: Any) -> tuple[str, str]:
        """Of a pair the longer text loses first, so which one is longer must not change.

        That is told by characters where both are cut; an odd token may then fall to the other text. (Whole, they would
        take tokenizers time by the product of their lengths.)
        """
        if not any(is_long(text, max_length) for text in pair):
            return pair
        shorter, longer = sorted(pair, key=len)
        short = cut(shorter, max_length, self.length)
        long = cut(longer, max(max_length, self.length(short) + 1), self.length)
        return (long, short) if pair[0] is longer else (short, long)

    def _call(
        self, texts: list[str], pairs: list[str] | None, targets: bool, **options: Any
    ) -> dict[str, list[list[int]]]:
        named = {"text_target": texts} if targets else {"text": texts, "text_pair": pairs}
        encoded = self._tokenizer(**named, **options, **self._options)
        return {name: encoded[name] for name in encoded}

    def _count(self, row: list[int]) -> int:
        return sum(map(self._special.__contains__, row))
