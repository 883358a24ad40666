"""What tokens depend on: the texts, the tokenizer, the task's keys, and the code that makes them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.config.schema import TaskConfig

#: Keys of the task that decide how a text of a given kind is read. Names of columns do not: their texts are looked at.
_KEYS = ("type", "prefix", "loss_on", "source_lang", "target_lang", "chat_date", "max_length", "max_target_length")
#: Keys of which only matters whether there is such a column.
_COLUMNS = ("text", "source", "target", "input", "messages", "tools")
#: Attributes of a tokenizer beside its backend.
_SETTINGS = ("model_input_names", "padding_side", "truncation_side", "chat_template", "src_lang", "tgt_lang",
             "special_tokens_map", "split_special_tokens")  # fmt: skip
#: Most rows, and about the most bytes of text, that are looked at together: tokenizers take 150 bytes a token.
ROWS, BYTES = 2**10, 2**20


def recipe(cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, limit: int) -> str:
    """A digest of all that tokens depend on beside the texts.

    Args:
        limit: tokens of a row, at most.
    """
    keys = {key: getattr(cfg, key) for key in _KEYS}
    columns = {key: value if not isinstance(value, list) else len(value) for key, value in _present(cfg)}
    known = {
        "limit": limit,
        "keys": keys,
        "columns": columns,
        "tokenizer": tokenizer_digest(tokenizer),
        # where a decoder starts and which segments and languages a model knows
        "model": model_config.to_dict() if cfg.type == "seq2seq" else None,
        "code": code_digest(),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _present(cfg: TaskConfig) -> Iterator[tuple[str, Any]]:
    for key in _COLUMNS:
        value = getattr(cfg, key)
        yield key, value if isinstance(value, list) else value is not None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a fast tokenizer does, whatever it has been asked before."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # the last call's
    settings = {name: getattr(tokenizer, name, None) for name in _SETTINGS}
    settings["class"] = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    settings["added"] = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    text = json.dumps([backend, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """A digest of the code that reads texts: no number that somebody has to remember to raise."""
    tasks = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in [*sorted((tasks / "objectives").glob("*.py")), tasks / "rows" / "conversations.py", Path(__file__)]:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def text_digest(view: datasets.Dataset, columns: list[str]) -> str:
    """A digest of some columns' texts in order, the same however the rows lie in files and blocks."""
    lengths, contents = ([hashlib.sha256() for _ in columns] for _ in range(2))
    for table in text_blocks(view, columns):
        for place, name in enumerate(columns):
            array = _one_array(table.column(name))
            known = pc.fill_null(pc.binary_length(array), -1).to_numpy(zero_copy_only=False)
            lengths[place].update(known.astype("<i8").tobytes())
            contents[place].update(_bytes_of(array))
    return hashlib.sha256("".join(part.hexdigest() for part in [*lengths, *contents]).encode()).hexdigest()


def text_blocks(view: datasets.Dataset, columns: list[str]) -> Iterator[pa.Table]:
    """The rows in order, so many at once as take about :data:`BYTES`."""
    chosen = view.select_columns(columns).with_format("arrow")
    each = max(text_bytes(view, columns) / max(len(view), 1), 1.0)
    for block in blocks(len(view), int(min(max(BYTES // each, 1), ROWS))):
        yield chosen[block]


def text_bytes(view: datasets.Dataset, columns: list[str]) -> int:
    """About how many bytes the texts take: of some rows of a file as many as their share of it."""
    table = view.data.select(columns)
    return int(sum(column.nbytes for column in table.columns) * len(view) / max(len(view.data), 1))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    made = column.combine_chunks()
    return pa.concat_arrays(made.chunks) if isinstance(made, pa.ChunkedArray) else made


def _bytes_of(array: pa.Array) -> memoryview:
    """All texts of an array, one behind the other."""
    kind = np.int64 if pa.types.is_large_string(array.type) else np.int32
    _, ends, data = array.buffers()
    if not len(array) or data is None:
        return memoryview(b"")
    found = np.frombuffer(ends, kind)[array.offset : array.offset + len(array) + 1]
    return memoryview(data)[int(found[0]) : int(found[-1])]
