"""How a source becomes a prompt and a target an answer, for causal models."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError


class PromptFormat:
    """Prompt and answer as token ids; a sample is their concatenation, and generation starts from the prompt alone.

    With a chat template (``tokenizer.chat_template``) the prompt is one user turn and the opening of the
    assistant's; the answer is the target and whatever the template closes a turn with. Without one the prompt is
    ``source + "\\n"`` after the tokenizer's begin token, if it uses one, and the answer ends with the end token.

    Prompt and answer are tokenized apart, for that is how they meet in generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("task.type='causal' needs a tokenizer with an end token (eos_token); this one has none")
        self._tokenizer, self._prefix = tokenizer, prefix
        self._chat = tokenizer.chat_template is not None
        begin = tokenizer("")["input_ids"][:1]
        self._begin: list[int] = [] if self._chat or begin != [tokenizer.bos_token_id] else begin
        opening, self._lead, closing = _turn_marks(tokenizer) if self._chat else ("", "", "")
        self._opening = opening
        end = self._plain_ids([closing])[0]
        if not end or end[-1] not in tokenizer.added_tokens_decoder:  # nothing that could end a generation
            end = [*end, int(tokenizer.eos_token_id)]
        self._end = end
        #: Tokens of a prompt with an empty source.
        self.overhead = len(self._prompt_ids([""])[0])

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generated answer."""
        return sorted({self._end[-1], int(self._tokenizer.eos_token_id)})

    def prompts(self, sources: list[str], limit: int) -> list[list[int]]:
        """Prompts of at most ``limit`` tokens.

        A long source loses its beginning; the begin token and the template around it stay whole.
        """
        assert limit > self.overhead, (limit, self.overhead)
        ids = self._prompt_ids(sources)
        return [
            row if len(row) <= limit else self._cut(text, row, limit) for text, row in zip(sources, ids, strict=True)
        ]

    def answers(self, targets: list[str], limit: int) -> list[list[int]]:
        """Answers of at most ``limit`` tokens. One that is cut has no end token: it did not end there."""
        return [[*ids, *self._end][:limit] for ids in self._plain_ids([self._lead + text for text in targets])]

    def _cut(self, source: str, ids: list[int], limit: int) -> list[int]:
        encoded = self._tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        keep = len(offsets)
        while keep > 1 and len(ids) > limit:  # a cut inside a word can make other tokens of it: count again
            keep = max(1, keep - (len(ids) - limit))
            ids = self._prompt_ids([source[offsets[-keep][0] :]])[0]
        return ids[-limit:]  # a no-op, unless the last word alone is too long

    def _prompt_ids(self, sources: list[str]) -> list[list[int]]:
        texts = [self._prefix + text for text in sources]
        if self._chat:
            texts = [_render(self._tokenizer, text) + self._opening for text in texts]
        else:
            texts = [text + "\n" for text in texts]
        return [self._begin + ids for ids in self._plain_ids(texts)]

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _turn_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What a chat template puts around an answer: (end of the prompt, blanks before the answer, end of the turn).

    Taken from an example. Some templates open an answer with more than they give as generation prompt, such as
    an empty thought; that belongs to the prompt. Line ends after the end of the turn are left out: the model has
    stopped by then.
    """
    prompt, whole = _render(tokenizer, "question"), _render(tokenizer, "question", "answer")
    before, found, after = whole.removeprefix(prompt).partition("answer")
    if not whole.startswith(prompt) or not found:
        return "", "", ""
    return (before, "", after.rstrip()) if before.strip() else ("", before, after.rstrip())


def _render(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None = None) -> str:
    """The chat template's text of one user turn, and of the assistant's turn or its opening."""
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    assert isinstance(text, str), "apply_chat_template(tokenize=False) returns text"
    return text
