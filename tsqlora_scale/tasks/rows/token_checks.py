"""Texts that are filled, and of which a tokenizer still makes nothing: a row of padding to learn from."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.every_split import column_words, for_every_split, sample_name, without
from tsqlora_scale.tasks.rows.turn_checks import with_written_turns
from tsqlora_scale.tasks.rows.wanted import INPUT_KEY, STRUCTURED_KEYS, text_columns

#: Letters, digits, punctuation, signs of mathematics and money: what every normaliser keeps.
_SOLID = r"[\p{L}\p{N}\p{P}\p{Sm}\p{Sc}]"
#: Characters of many scripts. A tokenizer that drops one can drop a text of solid characters, too.
_SCRIPTS = ("Ж", "中", "ก", "\U0001d356", "ꙮ", "∯", "\U0001f600")
#: Rows that are in memory at once.
_ROWS = 2**14
#: Characters of a text that are looked at first.
_BEGINNING = 1000


def with_tokens(cfg: TaskConfig, data: Data, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows of which the tokenizer makes something.

    Characters that normalisers drop (control, format and combining characters, blanks of all kinds) make a text that
    is filled and gives no token. Only texts of such alone are tokenised, unless the tokenizer drops what it does not
    know.

    Raises:
        UserError: naming the first row that gives nothing, unless ``task.dataset.drop_empty`` leaves such rows out.
    """
    if cfg.messages is not None and cfg.objective is None:
        return with_written_turns(cfg, data, tokenizer)
    encoder = TextEncoder(tokenizer)
    drops = any(not _gives_tokens(encoder, character) for character in _SCRIPTS)
    return for_every_split(cfg, data, lambda own, rows, where: _split_with_tokens(own, rows, where, encoder, drops))


def _split_with_tokens(
    cfg: TaskConfig, rows: datasets.Dataset, where: str, encoder: TextEncoder, drops: bool
) -> datasets.Dataset:
    if SAMPLE_ID not in rows.column_names:  # rows to be answered: each of them is
        return rows
    kept = new_array(len(rows), bool)
    kept[:] = True
    for key, name in text_columns(cfg).items():
        if key in (INPUT_KEY, *STRUCTURED_KEYS):
            continue
        view = rows.select_columns([name, SAMPLE_ID]).with_format("arrow")
        for block in blocks(len(rows), _ROWS):
            table = view[block]
            texts = table[name].combine_chunks()  # of selected rows every one is a chunk, for which a regex is compiled
            solid = pc.match_substring_regex(texts, _SOLID).to_numpy(zero_copy_only=False)
            for place in np.flatnonzero(~solid | drops):
                text = texts[int(place)].as_py()
                if _gives_tokens(encoder, text):
                    continue
                kept[block.start + place] = False
                if not cfg.dataset.drop_empty:
                    raise UserError(_refusal(cfg, where, table[SAMPLE_ID][int(place)].as_py(), name, text))
    return without(rows, kept, where, "of which the tokenizer makes nothing", "give the model's own tokenizer")


def _refusal(cfg: TaskConfig, where: str, sample: str, name: str, text: str) -> str:
    return (
        f"{where}, {sample_name(cfg, sample)}: {column_words(cfg, name)} is {shown(text)}, of which the tokenizer "
        "makes nothing; fill it in, or set task.dataset.drop_empty=true to leave such rows out"
    )


def _gives_tokens(encoder: TextEncoder, text: str) -> bool:
    try:
        return any(encoder.length(part) > 0 for part in (text[:_BEGINNING], text) if part)
    except Exception:  # the tokenizer's own, of a vocabulary without a token for unknown words
        return False
