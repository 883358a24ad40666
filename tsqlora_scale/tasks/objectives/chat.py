"""Causal models on whole conversations, with the loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import IGNORED, Batch, pad_rows
from tsqlora_scale.tasks.losses import token_losses
from tsqlora_scale.tasks.objectives.causal import check_decoder, continued
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens, Tools
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows, Tokens
from tsqlora_scale.tasks.objectives.tokenizing import pad_id
from tsqlora_scale.tasks.objectives.turn_spans import UnwrittenTurn
from tsqlora_scale.tasks.rows.conversations import Message, read_conversation, read_tools, up_to_last_answer


class ChatObjective:
    """Token cross-entropy of the assistant's turns (``task.loss_on``) given all that is before them.

    ``max_length`` bounds a conversation (:class:`.ConversationTokens` says what is left out of a longer one), of which
    the last answer has at least ``max_target_length`` tokens where it needs them. The prompt that evaluation shows the
    model does not depend on that answer: it has what ``max_target_length`` leaves.
    """

    peft_task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.messages is not None, "the config requires a column of conversations"
        check_decoder(tokenizer, model_config)
        self._cfg, self._tokenizer = cfg, tokenizer
        self._tokens = ConversationTokens(tokenizer, cfg)
        self._pad = pad_id(tokenizer)
        self.answer = cfg.messages
        self.columns = [cfg.messages, *([cfg.tools] if cfg.tools is not None else [])]
        self.token_columns = self.columns
        answer_limit(cfg, cfg.max_length)

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Conversations, padded on the right (B, T); targets (B, T) at the learned tokens' own positions."""
        return self.padded(self.tokens(rows, max_length), rows)

    def tokens(self, rows: Rows, max_length: int) -> Tokens:
        """Every conversation's tokens, and which of them are learned."""
        most = answer_limit(self._cfg, max_length)
        made = []
        for messages, tools in self._conversations(rows):
            with _named(messages):
                made.append(self._tokens.marked(messages, tools, max_length, most))
        return {"input_ids": [row.ids for row in made], "learned": [[*map(int, row.learned)] for row in made]}

    def padded(self, tokens: Tokens, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """What :meth:`collate` makes of rows with these tokens."""
        ids = tokens["input_ids"]
        inputs = {
            "input_ids": pad_rows(ids, self._pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        }
        both = zip(ids, tokens["learned"], strict=True)
        targets = [[i if told else IGNORED for i, told in zip(row, learned, strict=True)] for row, learned in both]
        return inputs, pad_rows(targets, IGNORED)

    def prompts(self, rows: Rows) -> dict[str, Tensor]:
        """What comes before the last answers, (B, P), padded on the left, as generation needs it."""
        limit = self._cfg.max_length - answer_limit(self._cfg, self._cfg.max_length)
        made = []
        for messages, tools in self._conversations(rows):
            with _named(messages):
                made.append(self._tokens.prompt(messages, tools, limit))
        return {
            "input_ids": pad_rows(made, self._pad, on_the_left=True),
            "attention_mask": pad_rows([[1] * len(row) for row in made], 0, on_the_left=True),
        }

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One loss term for each learned token: logits at position t speak of the token at t + 1."""
        return token_losses(logits[:, :-1], targets[:, 1:])

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The last answers by beam search, from the turns before them alone."""
        assert batch.prompts is not None, "batches of the pool are not answered"
        ends = self._tokens.stop_ids
        return continued(module, self._tokenizer, self._cfg, batch.prompts, ends=ends, synced=synced)

    def references(self, rows: Rows) -> list[str]:
        """The last answers' texts; of one that holds calls of tools alone these, as the template writes them."""
        found = []
        for messages, tools in self._conversations(rows):
            messages = up_to_last_answer(messages)
            with _named(messages):
                content = messages[-1]["content"]
                found.append(content if content.strip() else self._tokens.answer(messages, tools))
        return found

    def texts(self, rows: Rows) -> list[tuple[str, ...]]:
        """All that is said before the last answer, a turn a line, and that answer."""
        found: list[tuple[str, ...]] = []
        for messages, _ in self._conversations(rows):
            *before, last = up_to_last_answer(messages)
            found.append(("\n".join(turn["content"] for turn in before), last["content"]))
        return found

    def preview(self, rows: Rows) -> list[str]:
        """``role: content | ... -> answer``."""
        found = []
        for messages, _ in self._conversations(rows):
            *before, last = up_to_last_answer(messages)
            found.append(" | ".join(f"{turn['role']}: {turn['content']}" for turn in before) + f" -> {last['content']}")
        return found

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of conversations, and of what is learned of them."""
        sizes = [self._tokens.length(messages, tools, MEASURED) for messages, tools in self._conversations(rows)]
        limit = self._cfg.max_length
        return [
            Measured("conversation", [whole for whole, _ in sizes], limit, "oldest exchanges"),
            Measured("of them learned", [learned for _, learned in sizes], limit, "oldest exchanges"),
        ]

    def _conversations(self, rows: Rows) -> list[tuple[list[Message], Tools]]:
        cells = rows[self.answer]
        tools = [None] * len(cells) if self._cfg.tools is None else rows[self._cfg.tools]
        return [(read_conversation(c), read_tools(t)) for c, t in zip(cells, tools, strict=True)]


def answer_limit(cfg: TaskConfig, max_length: int) -> int:
    """Tokens that a last answer has at least where it needs them: in proportion, in a batch of a smaller length.

    Raises:
        UserError: they leave nothing for a prompt.
    """
    limit = cfg.max_target_length
    if max_length < cfg.max_length:
        limit = max(1, limit * max_length // cfg.max_length)
    if max_length <= limit:
        name = "task.max_length" if max_length == cfg.max_length else "a text's max_length"
        raise UserError(
            f"{name}={max_length} leaves nothing before an answer of task.max_target_length={limit} tokens; "
            "raise it or lower task.max_target_length"
        )
    return limit


@contextmanager
def _named(messages: list[Message]) -> Iterator[None]:
    """Inside, a template that fails on a conversation, which the check before the run did not see, is a user's error.

    Raises:
        UserError: see there.
    """
    try:
        yield
    except UnwrittenTurn as error:
        start = " ".join(messages[0]["content"].split())[:60]
        raise UserError(f"the conversation that begins {start!r}: the tokenizer's chat template {error}") from None
