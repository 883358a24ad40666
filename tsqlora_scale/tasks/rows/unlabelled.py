"""New rows to be answered: the columns of text alone, whatever else their file holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import filled as ones
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.column_checks import check_text
from tsqlora_scale.tasks.rows.conversations import answerable, check_tools
from tsqlora_scale.tasks.rows.data import Data, check_classes_known
from tsqlora_scale.tasks.rows.joined_conversations import joined
from tsqlora_scale.tasks.rows.sources import open_dev
from tsqlora_scale.tasks.rows.wanted import INPUT_KEY, SYSTEM_KEY, Wanted, text_columns

#: Stands where a row has no target yet; nothing that a model answers depends on it.
PLACEHOLDER = "."


@dataclass(frozen=True)
class Unlabelled:
    """Rows without answers.

    Attributes:
        data: them as a held-out set, with something in the place of every answer.
        filled: which rows have a text to be answered, (N,) bool.
    """

    data: Data
    filled: np.ndarray


def load_unlabelled(cfg: TaskConfig, file: Path) -> Unlabelled:
    """Open the rows of a file of any format that training reads.

    Args:
        cfg: the task; of the file only the columns of its texts are asked for.

    Raises:
        UserError: as for a held-out file, but that labels and targets may be missing, or anything.
    """
    if not file.is_file():
        what = "is no file" if file.exists() else "no such file"
        raise UserError(f"--data {str(file)!r}: {what}; give a csv, tsv, jsonl or parquet file")
    check_classes_known(cfg)
    source = cfg.dataset.model_copy(
        update={"name": None, "path": str(file.absolute().parent), "train_file": file.name, "dev_file": file.name}
    )
    texts = {key: name for key, name in text_columns(cfg).items() if key != "task.target"}
    if cfg.system is not None:
        texts[SYSTEM_KEY] = cfg.system
    opened = open_dev(source, "", Wanted(texts, others=cfg.objective is not None), label=None)
    raw, where = opened.rows, opened.where
    filled = ones(len(raw), bool, True)
    if cfg.messages is not None:
        if cfg.tools is not None:
            check_tools(raw.data.column(cfg.tools), cfg.tools, where=where, kept=filled)
        column = raw.data.column(cfg.messages)
        if cfg.system is not None:
            parts = {SYSTEM_KEY: (cfg.system, raw.data.column(cfg.system))}
            column = joined(column, cfg.messages, parts, where=where, kept=filled)
        cells, filled = answerable(column, cfg.messages, where=where)
        return Unlabelled(_with_column(cfg, raw, cfg.messages, cells), filled)
    for name in [name for key, name in texts.items() if key != INPUT_KEY]:
        filled &= check_text(raw.data.column(name), name, where=where, kept=filled, may_be_empty=True)
    answer = cfg.target or cfg.label
    assert answer is not None, "the config requires one"
    blank = pa.repeat({"regression": 0.0, "classification": 0}.get(cfg.type, PLACEHOLDER), len(raw))
    return Unlabelled(_with_column(cfg, raw, answer, blank), filled)


def _with_column(cfg: TaskConfig, raw: datasets.Dataset, name: str, cells: pa.Array) -> Data:
    """The rows as a held-out set, with a column in the place of their own."""
    identity = hashlib.sha256(repr((raw._fingerprint, cfg.type, name)).encode()).hexdigest()[:16]
    added = datasets.Dataset(pa.table({name: cells}), fingerprint=identity)
    kept = raw.remove_columns([name]) if name in raw.column_names else raw
    rows = datasets.concatenate_datasets([kept, added], axis=1) if kept.column_names else added
    return Data(rows.select([]), rows)
