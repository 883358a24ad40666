"""Conversations that a chat template does not write, or of which nothing would be learned."""

from __future__ import annotations

import datasets
from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.chat import answer_limit
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens
from tsqlora_scale.tasks.objectives.turn_spans import UnwrittenTurn
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.conversations import read_conversation, read_tools
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.every_split import column_words, for_every_split, sample_name, without

#: Rows that are in memory at once.
_ROWS = 2**12


def with_written_turns(cfg: TaskConfig, data: Data, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows whose turns the chat template writes, and of which tokens are learned.

    Raises:
        UserError: naming the first row of which that is not so, unless ``task.dataset.drop_empty`` leaves such rows
            out; or there is no template that can be used.
    """
    if not tokenizer.is_fast:  # which is said where the objective is built
        return data
    tokens = ConversationTokens(tokenizer, cfg)
    return for_every_split(cfg, data, lambda own, rows, where: _written(own, rows, where, tokens))


def _written(cfg: TaskConfig, rows: datasets.Dataset, where: str, tokens: ConversationTokens) -> datasets.Dataset:
    if not len(rows):
        return rows
    assert cfg.messages is not None, "the config requires a column of conversations"
    most = answer_limit(cfg, cfg.max_length)
    ours = SAMPLE_ID in rows.column_names  # rows to be answered have no such column, and each of them is
    where = where if ours else "the rows to be answered"
    drop, first = ours and cfg.dataset.drop_empty, None
    kept = new_array(len(rows), bool)
    kept[:] = True
    view = rows.select_columns([name for name in (cfg.messages, cfg.tools, SAMPLE_ID) if name in rows.column_names])
    for block in blocks(len(rows), _ROWS):
        table = view[block]
        for place, cell in enumerate(table[cfg.messages]):
            tools = None if cfg.tools is None else table[cfg.tools][place]
            try:
                tokens.check(read_conversation(cell), read_tools(tools), cfg.max_length, most)
            except UnwrittenTurn as error:
                row = block.start + place
                sample = sample_name(cfg, table[SAMPLE_ID][place]) if ours else f"row {row + 1}"
                message = f"the tokenizer's chat template {error}"
                if not drop:
                    remedy = ", or set task.dataset.drop_empty=true to leave such rows out" if ours else ""
                    column = column_words(cfg, cfg.messages)
                    raise UserError(
                        f"{where}, {sample}: the conversation in {column}: {message}; mend it{remedy}"
                    ) from None
                first = first or f"{sample}: {message}"
                kept[row] = False
    which = f"that the chat template does not write, or of which nothing is learned (the first is {first})"
    return without(rows, kept, where, which, "give the model's own tokenizer")
