"""The checked pool and held-out set, before a tokenizer or a model is loaded."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.common.random_streams import subset_rows
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.metrics import check_metrics
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID, check_text, require_columns, sample_ids
from tsqlora_scale.tasks.rows.label_cells import class_ids, regression_targets
from tsqlora_scale.tasks.rows.sources import SplitName, open_split

log = logging.getLogger("tsqlora_scale")


@dataclass(frozen=True)
class Data:
    """The pool and the held-out set.

    Both have the columns of their source, text memory-mapped, and two columns of ours: ``sample_id`` (string,
    unique, of the whole source even where only a subset of it is used) and, for classification and regression,
    the label column as class ids (int64) or numbers (float32).
    """

    train: datasets.Dataset
    dev: datasets.Dataset | None


def load_dev(cfg: TaskConfig, *, seed: int) -> Data:
    """The held-out set alone, opened and checked; the pool is left without rows, and its file need not be there.

    Raises:
        UserError: as :func:`load_data`, or there is no held-out set.
    """
    check_metrics(cfg.metrics, cfg.type)
    _check_declared_labels(cfg)
    dev = _load_split(cfg, "dev", seed)
    if dev is None:
        key = "dev_file" if cfg.dataset.name is None else "dev_split"
        raise UserError(f"task.dataset.{key} is not set, and evaluation needs it; name the held-out set")
    return Data(dev.select([]), dev)


def load_data(cfg: TaskConfig, *, seed: int) -> Data:
    """Open and check both splits.

    Args:
        cfg: the task.
        seed: fixes the subsets that ``max_train_samples`` and ``max_dev_samples`` keep. A smaller subset is
            part of a larger one of the same seed.

    Raises:
        UserError: one line that names the key, or the file and row (from 1, without the header), the value
            and the remedy.
    """
    check_metrics(cfg.metrics, cfg.type)
    _check_declared_labels(cfg)
    train = _load_split(cfg, "train", seed)
    assert train is not None, "the config requires a training split"
    return Data(train, _load_split(cfg, "dev", seed))


def text_columns(cfg: TaskConfig) -> dict[str, str]:
    """Config key -> name of every column of text that the task reads."""
    named = {"task.source": cfg.source, "task.target": cfg.target}
    if cfg.type in ("classification", "regression"):
        return {f"task.text[{i}]": name for i, name in enumerate(cfg.text)}
    return {key: name for key, name in named.items() if name is not None}


def _load_split(cfg: TaskConfig, split: SplitName, seed: int) -> datasets.Dataset | None:
    texts = text_columns(cfg)
    opened = open_split(cfg.dataset, split, text_columns=list(texts.values()))
    if opened is None:
        return None
    raw, where = opened
    labelled = cfg.type in ("classification", "regression")
    id_column = cfg.dataset.id_column
    if split == "dev" and id_column not in raw.column_names:
        id_column = None  # ids tell the samples of the pool apart; a held-out file often has none
    required = dict(texts)
    if labelled and cfg.label is not None:
        required["task.label"] = cfg.label
    if id_column is not None:
        required["task.dataset.id_column"] = id_column
    require_columns(raw, required, where=where)
    drop = cfg.dataset.drop_empty
    filled = new_array(len(raw), bool)
    filled[:] = True
    for name in texts.values():
        filled &= check_text(raw, name, where=where, may_be_empty=drop)
    own_columns: dict[str, pa.Array | pa.ChunkedArray | np.ndarray] = {
        SAMPLE_ID: sample_ids(raw, id_column, where=where)
    }
    if labelled and cfg.label is not None:
        own_columns[cfg.label] = _targets(cfg, raw, cfg.label, where)
    kept = raw.remove_columns([name for name in own_columns if name in raw.column_names])
    # a fingerprint of its own, or one is taken of a copy of the table; the same on all ranks
    identity = repr((raw._fingerprint, id_column, cfg.type, cfg.label, cfg.labels))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    added = datasets.Dataset(pa.table(own_columns), fingerprint=fingerprint)
    dataset = datasets.concatenate_datasets([kept, added], axis=1)
    if not filled.all():
        left_out = len(filled) - int(np.count_nonzero(filled))
        log.warning("%s: %d rows with an empty text are left out", printable(where), left_out)
        dataset = dataset.select(np.flatnonzero(filled))
        if not len(dataset):
            raise UserError(f"{where}: every row has an empty text; check task.text, task.source and task.target")
    limit = cfg.dataset.max_train_samples if split == "train" else cfg.dataset.max_dev_samples
    if limit is None or limit >= len(dataset):
        return dataset
    # files are often sorted, so a head is no sample
    return dataset.select(subset_rows(len(dataset), limit, seed=seed, split=split))


def _targets(cfg: TaskConfig, raw: datasets.Dataset, label: str, where: str) -> np.ndarray:
    column = raw.data.column(label)
    if cfg.type == "regression":
        return regression_targets(column, where=where, name=label)
    assert cfg.labels is not None, "the config requires labels of a classification task"
    feature = raw.features[label]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return class_ids(column, cfg.labels, where=where, name=label, names=names)


def _check_declared_labels(cfg: TaskConfig) -> None:
    if cfg.type != "classification":
        return
    if cfg.num_labels < 2:
        raise UserError(f"task.labels={cfg.labels!r}: a classification task needs at least two classes")
    if isinstance(cfg.labels, list) and len(set(cfg.labels)) < len(cfg.labels):
        raise UserError(f"task.labels={cfg.labels!r}: a class is named twice; name each once")
