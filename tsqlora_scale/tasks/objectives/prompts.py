"""How a source becomes a prompt and a target an answer, for causal models."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.objectives.chat_template import chat_marks
from tsqlora_scale.tasks.objectives.early_cut import head, is_long, longest_end, tail
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder, special_ids


class PromptFormat:
    """Prompt and answer as token ids; a sample is their concatenation, and generation starts from the prompt alone.

    With a chat template (``tokenizer.chat_template``) the prompt is one user turn and the opening of the
    assistant's; the answer is the target and whatever the template closes a turn with. Without one the prompt is
    ``source + "\\n"`` after the tokenizer's begin token, if it uses one, and the answer ends with the end token.

    Prompt and answer are tokenized apart, for that is how they meet in generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str = "", today: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("task.type='causal' needs a tokenizer with an end token (eos_token); this one has none")
        self._tokenizer, self._prefix = tokenizer, prefix
        self._texts = TextEncoder(tokenizer)
        self._special = special_ids(tokenizer)
        self._chat = chat_marks(tokenizer, today)
        begin = tokenizer("")["input_ids"][:1]
        self._begin: list[int] = [] if self._chat or begin != [tokenizer.bos_token_id] else begin
        end = self._marked_ids([self._chat.closing if self._chat else ""])[0]
        if not end or end[-1] not in tokenizer.added_tokens_decoder:  # nothing that could end a generation
            end = [*end, int(tokenizer.eos_token_id)]
        self._end = end
        empty = self._prompt_ids([""])[0]
        #: Tokens of a prompt with an empty source.
        self.overhead = len(empty)
        self._own_special = self._count(empty)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generated answer."""
        return sorted({self._end[-1], int(self._tokenizer.eos_token_id)})

    def prompts(self, sources: list[str], limit: int, *, inputs: list[str | None] | None = None) -> list[list[int]]:
        """Prompts of at most ``limit`` tokens.

        A long source loses its beginning; the begin token and the template around it stay whole. Where something is
        given behind it, that loses its own beginning, and the source stays whole as long as anything of it is left.

        Args:
            inputs: what is given behind each source, a blank line between them; None: nothing.
        """
        if inputs is None:
            return self._cut_prompts(sources, limit)[0]
        both = list(zip(sources, inputs, strict=True))
        found, is_cut = self._cut_prompts([s if text is None else self.joined(s, text) for s, text in both], limit)
        for i, (source, text) in enumerate(both):
            if text is not None and is_cut[i]:
                found[i] = self._cut_input(source, text, limit) or found[i]
        return found

    @staticmethod
    def joined(source: str, text: str) -> str:
        """A source and what is given behind it."""
        return f"{source}\n\n{text}"

    def _cut_input(self, source: str, text: str, limit: int) -> list[int] | None:
        """The prompt of a source with as much of the end of what is given behind it as lets it fit; None where nothing
        of it would be left."""
        text = tail(text, limit, self._texts.length)
        if is_long(source, limit) and self._texts.length(tail(source, limit, self._texts.length)) >= limit:
            return None
        if self._chat:
            source, text = self._texts.among_marks(source), self._texts.among_marks(text)
        text, offsets = self._texts.with_offsets(text)

        def prompt(end: str) -> list[int]:
            return self._prompt_ids([self.joined(source, end)])[0]

        return longest_end(text, offsets, prompt, lambda ids: len(ids) - limit)

    def _cut_prompts(self, sources: list[str], limit: int) -> tuple[list[list[int]], list[bool]]:
        """Prompts of at most ``limit`` tokens, and which of them have lost something."""
        assert limit > self.overhead, (limit, self.overhead)
        sources = [tail(text, limit, self._texts.length) for text in sources]
        ids = self._prompt_ids(sources)
        for i, row in enumerate(ids):
            if self._chat and self._count(row) > self._own_special:  # the source holds what reads like a mark
                sources[i] = self._texts.broken(sources[i])
                ids[i] = self._prompt_ids([sources[i]])[0]
        is_cut = [len(row) > limit for row in ids]
        rows = [
            self._cut(text, row, limit) if cut else row for text, row, cut in zip(sources, ids, is_cut, strict=True)
        ]
        return rows, is_cut

    def answers(self, targets: list[str], limit: int) -> list[list[int]]:
        """Answers of at most ``limit`` tokens. One that is cut has no end token: it did not end there."""
        lead = self._chat.lead if self._chat else ""
        texts = [lead + head(text, limit, self._texts.length) for text in targets]
        return [[*ids, *self._end][:limit] for ids in self._texts.plain(texts)]

    def _cut(self, source: str, ids: list[int], limit: int) -> list[int]:
        source, offsets = self._texts.with_offsets(source)
        keep = len(offsets)
        while keep > 1 and len(ids) > limit:  # a cut inside a word can make other tokens of it: count again
            keep = max(1, keep - (len(ids) - limit))
            ids = self._prompt_ids([source[offsets[-keep][0] :]])[0]
        return ids[-limit:]  # a no-op, unless the last word alone is too long

    def _prompt_ids(self, sources: list[str]) -> list[list[int]]:
        texts = [self._prefix + text for text in sources]
        if self._chat:
            return self._marked_ids([self._chat.prompt(text) for text in texts])
        return [self._begin + ids for ids in self._texts.plain([text + "\n" for text in texts])]

    def _marked_ids(self, texts: list[str]) -> list[list[int]]:
        """Of texts whose marks are read as the special tokens that they are."""
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _count(self, row: list[int]) -> int:
        return sum(map(self._special.__contains__, row))
