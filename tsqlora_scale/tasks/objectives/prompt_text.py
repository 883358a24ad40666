"""A row as a prompt: the template with the row's texts in it, behind the demonstrations, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.prompt_template import ANSWER, MASK, pieces_of
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.early_cut import head
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder

#: Characters of a demonstration's text that are kept, and by which a row is known to be one.
DEMONSTRATED = 1000


class PromptText:
    """Prompts as texts and as token ids.

    A prompt that is too long loses ends of its texts, the longer one first; the template and the demonstrations stay
    whole. Of ``max_length`` tokens the demonstrations' texts have at most half, in equal parts. A row that is itself
    one of the demonstrations is asked without it, for its answer would stand there.

    Args:
        slot: what stands at the slot: the mask; empty, where the word for the class is what comes next.
        ids: the tokens of prompts, whose marks are read as the special tokens that they are.
    """

    def __init__(
        self,
        cfg: TaskConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slot: str,
        ids: Callable[[list[str]], list[list[int]]],
    ) -> None:
        assert cfg.prompt is not None
        self._cfg, self._slot, self._ids = cfg, slot, ids
        self._encoder = TextEncoder(tokenizer)
        self._pieces = pieces_of(cfg.prompt)
        self._shown: list[tuple[list[str], str]] = []

    @property
    def lead(self) -> str:
        """The template's own text in front of the slot, back to the last place in it."""
        return next(piece.text for piece in self._pieces if piece.place in (MASK, ANSWER))

    def demonstrate(self, words: Sequence[str]) -> None:
        """Put the rows of ``task.demonstrated`` before each prompt, with the classes' words (C,) in their slots.

        Raises:
            UserError: they and the template leave no room for a text.
        """
        rows = self._cfg.demonstrated
        most = max(self._cfg.max_length // max(2 * len(rows) * len(self._cfg.text), 1), 1)
        self._shown = []
        for *texts, number in rows:
            cut = {name: self._head(text, most) for name, text in zip(self._cfg.text, texts, strict=True)}
            self._shown.append((texts, self._filled(cut, words[int(number)])))
        self._check_room(self._cfg.max_length)

    def texts(self, rows: Mapping[str, Sequence[str]]) -> list[str]:
        """Prompts of some rows, given by their columns, with all of their texts."""
        columns = [rows[name] for name in self._cfg.text]
        return [self._prompt(dict(zip(self._cfg.text, texts, strict=True))) for texts in zip(*columns, strict=True)]

    def rows(self, rows: Mapping[str, Sequence[str]], limit: int) -> list[list[int]]:
        """Token ids of prompts, each of at most ``limit`` tokens.

        Raises:
            UserError: the prompt takes as many without any text.
        """
        self._check_room(limit)
        columns = [rows[name] for name in self._cfg.text]
        given = [dict(zip(self._cfg.text, texts, strict=True)) for texts in zip(*columns, strict=True)]
        short = [{name: head(text, limit, self._encoder.length) for name, text in row.items()} for row in given]
        ids = self._ids([self._prompt(row, whole) for row, whole in zip(short, given, strict=True)])
        return [
            row if len(row) <= limit else self._cut(texts, whole, row, limit)
            for texts, whole, row in zip(short, given, ids, strict=True)
        ]

    def _prompt(self, texts: Mapping[str, str], whole: Mapping[str, str] | None = None) -> str:
        """One prompt; a demonstration of the ``whole`` row's own texts is left out."""
        own = [text[:DEMONSTRATED] for text in (whole or texts).values()]
        shown = [text for demonstrated, text in self._shown if demonstrated != own]
        filled = self._filled(texts, None)
        return "\n".join([*shown, filled if self._slot else filled.rstrip(" ")])

    def _filled(self, texts: Mapping[str, str], word: str | None) -> str:
        """The template with texts, and a word at its slot; None: what stands there while it is asked for."""
        parts = []
        for piece in self._pieces:
            if piece.place in (MASK, ANSWER):
                # the blank before a word is in the word's own token, of most tokenizers
                parts += [piece.text.rstrip(" "), self._slot] if word is None else [piece.text, word]
                continue
            parts.append(piece.text)
            if piece.place is None:
                continue
            parts.append(self._encoder.among_marks(texts[piece.place]))
        return "".join(parts)

    def _head(self, text: str, tokens: int) -> str:
        text, offsets = self._encoder.with_offsets(head(text, tokens, self._encoder.length))
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _cut(self, texts: Mapping[str, str], whole: Mapping[str, str], ids: list[int], limit: int) -> list[int]:
        read = {name: self._encoder.with_offsets(text) for name, text in texts.items()}
        keep = {name: len(offsets) for name, (_, offsets) in read.items()}
        while len(ids) > limit and any(keep.values()):  # a cut inside a word can make other tokens of it: count again
            for _ in range(len(ids) - limit):
                longest = max(keep, key=lambda name: keep[name])
                keep[longest] = max(keep[longest] - 1, 0)
            left = {
                name: text[: offsets[keep[name] - 1][1]] if keep[name] else "" for name, (text, offsets) in read.items()
            }
            (ids,) = self._ids([self._prompt(left, whole)])
        return ids

    def _check_room(self, limit: int) -> None:
        """Raises:
        UserError: the prompt alone has as many tokens as a row may have.
        """
        (empty,) = self._ids([self._prompt(dict.fromkeys(self._cfg.text, ""), dict.fromkeys(self._cfg.text, "\0"))])
        if len(empty) >= limit:
            name = "task.max_length" if limit == self._cfg.max_length else "a text's max_length"
            with_rows = f" with {len(self._shown)} demonstrations" if self._shown else ""
            fewer = " or lower task.demonstrations" if self._shown else " or shorten the prompt"
            raise UserError(
                f"{name}={limit}: task.prompt{with_rows} takes {len(empty)} tokens without a text; raise it,{fewer}"
            )
