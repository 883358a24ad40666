"""The checked pool and held-out sets, before a tokenizer or a model is loaded."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import blocks, copied
from tsqlora_scale.common.disk_arrays import filled as filled_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.common.random_streams import half_rows, subset_rows
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID, check_text, sample_ids
from tsqlora_scale.tasks.rows.conversations import check_conversations, check_tools
from tsqlora_scale.tasks.rows.excluded_ids import digest_of, not_excluded, read_ids
from tsqlora_scale.tasks.rows.joined_conversations import joined
from tsqlora_scale.tasks.rows.label_cells import class_ids, draw_weights, infer_labels, regression_targets
from tsqlora_scale.tasks.rows.numbering import Numbering, check_numbered_alike
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.query_rows import as_in_pool, check_query, query_ids
from tsqlora_scale.tasks.rows.row_ids import text_column
from tsqlora_scale.tasks.rows.set_columns import DATA_SET, ROW_WEIGHT, SetColumns
from tsqlora_scale.tasks.rows.sources import Opened, open_dev, open_query
from tsqlora_scale.tasks.rows.wanted import (
    EMPTY_KEYS,
    ID_KEY,
    LABEL_KEY,
    MESSAGES_KEY,
    STRUCTURED_KEYS,
    TOOLS_KEY,
    WEIGHT_KEY,
    Wanted,
    joined_columns,
    no_plain_cells,
    text_columns,
)

log = logging.getLogger("tsqlora_scale")

#: What the names of objectives begin with that the package brings itself.
OWN_OBJECTIVES = "tsqlora_scale."


@dataclass(frozen=True)
class Data:
    """The pool and the held-out sets.

    All have the columns that the task reads, text memory-mapped, and columns of ours: ``sample_id`` (string, unique,
    of the whole source even where only a part of it is used) and, for classification and regression, the label
    column as class ids (int64) or numbers (float32); the pool's weights are float64.

    Attributes:
        dev: the held-out set, or the first of several.
        more_dev: the others, by name.
        labels: ``task.labels``, or the classes that the pool holds where the config names none.
        query: the rows of ``task.query``, with the pool's columns.
    """

    train: datasets.Dataset
    dev: datasets.Dataset | None
    more_dev: dict[str, datasets.Dataset] = field(default_factory=dict)
    labels: list[str] | int | None = None
    query: datasets.Dataset | None = None

    def pool(self, *, with_query: bool) -> datasets.Dataset:
        """The rows that may be trained on: those of the pool and, behind them, the query's."""
        if self.query is None or not with_query:
            return self.train
        return datasets.concatenate_datasets([self.train, self.query])


def check_classes_known(cfg: TaskConfig) -> None:
    """Check that the config names the classes: those of other rows than the pool's may be others.

    Raises:
        UserError: it names none.
    """
    if cfg.type == "classification" and cfg.labels is None:
        raise UserError(
            "task.labels is not set, and without the pool the classes are not known; give the config.yaml of the run "
            "folder, which names them, or set task.labels"
        )


def wanted_columns(cfg: TaskConfig, *, pool: bool) -> Wanted:
    required, optional = {**text_columns(cfg), **joined_columns(cfg)}, {}
    label = label_column(cfg)
    if label is not None:
        required[LABEL_KEY] = label
    if pool and cfg.dataset.weight is not None:
        required[WEIGHT_KEY] = cfg.dataset.weight
    if cfg.dataset.id_column is None:
        optional["our own"] = SAMPLE_ID  # to say that there is one
    elif pool:
        required[ID_KEY] = cfg.dataset.id_column
    else:
        optional[ID_KEY] = (
            cfg.dataset.id_column
        )  # ids tell the samples of the pool apart; held-out files often have none
    # an objective of one's own may read any column; that of a pretraining, which is named likewise, reads one
    others = cfg.objective is not None and not cfg.objective.startswith(OWN_OBJECTIVES)
    return Wanted(required, optional, others=others)


def label_column(cfg: TaskConfig) -> str | None:
    return cfg.label if cfg.type in ("classification", "regression") else None


def load_pool(
    cfg: TaskConfig, opened: Opened, seed: int, part: SetColumns | None = None
) -> tuple[datasets.Dataset, list[str] | int | None, Numbering]:
    """The checked pool, the classes in it, and what its label numbers stand for.

    Args:
        part: which set of a mixture it is, if it is one.
    """
    excluded = None if cfg.dataset.exclude is None else read_ids(cfg.dataset.exclude)
    if excluded is not None and part is not None:
        excluded = part.own_ids(excluded)
    raw, where = opened.rows, opened.where
    ids = _ids(cfg, opened)
    kept, listed = filled_array(len(raw), bool, True), filled_array(len(raw), bool, False)
    if excluded is not None:
        assert cfg.dataset.exclude is not None
        kept &= not_excluded(ids, excluded, value=cfg.dataset.exclude, where=where)
        np.logical_not(kept, out=listed)
        _say_left_out(where, len(excluded), "that task.dataset.exclude lists")
    weights = None
    if cfg.dataset.weight is not None:
        weights = draw_weights(raw.data.column(cfg.dataset.weight), where=where, name=cfg.dataset.weight, kept=kept)
        before = int(np.count_nonzero(kept))
        for block in blocks(len(kept)):
            kept[block] &= weights[block] > 0
            listed[block] &= weights[block] > 0
        if before > np.count_nonzero(kept):
            _say_left_out(where, before - int(np.count_nonzero(kept)), f"whose {cfg.dataset.weight!r} is 0")
        if not kept.any():
            raise UserError(
                f"{WEIGHT_KEY}={cfg.dataset.weight!r}: every row of {where} weighs 0; at least one must not"
            )
    labels = cfg.labels
    if cfg.type == "classification" and labels is None:
        assert cfg.label is not None
        column = raw.data.column(cfg.label)
        counted = _with_text(cfg, opened, kept) if cfg.dataset.drop_empty else kept
        labels = infer_labels(column, where=where, name=cfg.label, names=opened.classes, kept=counted)
    found = cfg.model_copy(update={"labels": labels})
    dataset, stays = _checked(found, opened, ids, kept, weights, identity=digest_of(excluded), part=part)
    numbering = Numbering.opened_as(cfg, opened, stays)
    split = "train" if part is None else f"train {part.name}"
    dataset = _part(dataset, cfg.dataset.max_train_samples, seed, split, stays=stays, listed=listed)
    if not len(dataset):
        raise UserError(
            f"task.dataset.exclude={cfg.dataset.exclude!r}: leaves no row of those that max_train_samples="
            f"{cfg.dataset.max_train_samples} draws from {where}; raise it"
        )
    return dataset, labels, numbering


def load_dev_set(
    cfg: TaskConfig, name: str, seed: int, numbering: Numbering | None = None, part: SetColumns | None = None
) -> datasets.Dataset:
    """The checked held-out set ``name`` of ``cfg.dataset``.

    Args:
        numbering: what the pool's label numbers stand for.
        part: which set of a mixture it is of, if it is of one.
    """
    opened = open_dev(cfg.dataset, name, wanted_columns(cfg, pool=False), label=label_column(cfg))
    kept = filled_array(len(opened.rows), bool, True)
    dataset, stays = _checked(cfg, opened, _ids(cfg, opened), kept, None, identity="", part=part)
    check_numbered_alike(cfg, opened.where, Numbering.opened_as(cfg, opened, stays), numbering or Numbering())
    split = f"dev {name}" if name else "dev"
    if cfg.dataset.dev_half is not None:
        dataset = dataset.select(half_rows(len(dataset), cfg.dataset.dev_half, split=split))
        if not len(dataset):
            raise UserError(
                f"{opened.where}: has too few rows for a half to tune on and one to report (task.dataset.dev_half="
                f"{cfg.dataset.dev_half}); give it more, or set tuning.half: false in the comparison's file"
            )
    return _part(dataset, cfg.dataset.max_dev_samples, seed, split)


def load_query(
    cfg: TaskConfig, train: datasets.Dataset, sets: dict[str, datasets.Dataset], numbering: Numbering
) -> datasets.Dataset:
    """The checked rows of ``task.query``.

    Args:
        train: the pool.
        sets: the held-out sets.
        numbering: what the pool's label numbers stand for.
    """
    assert cfg.query is not None
    opened = open_query(cfg.dataset, cfg.query, wanted_columns(cfg, pool=False), label=label_column(cfg))
    kept = filled_array(len(opened.rows), bool, True)
    weights = None if cfg.dataset.weight is None else filled_array(len(kept), np.float64, 1.0)
    rows, stays = _checked(cfg, opened, query_ids(_ids(cfg, opened)), kept, weights, identity="query", part=None)
    check_numbered_alike(cfg, opened.where, Numbering.opened_as(cfg, opened, stays), numbering)
    check_query(rows, train, sets, text_columns(cfg), where=opened.where)
    ours = {DATA_SET: len(cfg.mixture), ROW_WEIGHT: 1.0} if cfg.mixture else {}
    return as_in_pool(rows, train, own_id=cfg.dataset.id_column, where=opened.where, ours=ours)


def _ids(cfg: TaskConfig, opened: Opened) -> pa.ChunkedArray | pa.Array:
    raw, name = opened.rows, cfg.dataset.id_column
    if name is None or name not in raw.column_names:
        present = raw.column_names if name is None else []
        return sample_ids(None, None, where=opened.where, size=len(raw), present=present)
    column = _text_of(raw, name, ID_KEY, opened.where)
    return sample_ids(column, name, where=opened.where, size=len(raw), present=[])


def _text_of(raw: datasets.Dataset, name: str, key: str, where: Origin) -> pa.ChunkedArray:
    """A column as texts.

    Raises:
        UserError: its type has no plain cells.
    """
    column = raw.data.column(name)
    texts = text_column(column, ids=key == ID_KEY, structured=key in STRUCTURED_KEYS)
    if texts is None:
        raise no_plain_cells(key, name, column.type, where=where)
    return texts


def _checked(
    cfg: TaskConfig,
    opened: Opened,
    ids: pa.ChunkedArray | pa.Array,
    kept: np.ndarray,
    weights: np.ndarray | None,
    *,
    identity: str,
    part: SetColumns | None,
) -> tuple[datasets.Dataset, np.ndarray]:
    """The rows that are ``kept`` (N,), with the columns of ours; of a ``part`` of a mixture with these alone. And which
    rows of the source these are in the end, (N,): not those whose text is empty.

    Args:
        identity: what the kept rows depend on beside the config and the source.
    """
    raw, where = opened.rows, opened.where
    parts = {key: (name, _text_of(raw, name, key, where)) for key, name in joined_columns(cfg).items()}
    raw = raw.remove_columns([name for name, _ in parts.values()])
    own_columns: dict[str, pa.Array | pa.ChunkedArray | np.ndarray] = {SAMPLE_ID: ids}
    filled, texts = copied(kept), {}
    for key, name in text_columns(cfg).items():
        column = _text_of(raw, name, key, where)
        if key == MESSAGES_KEY and parts:
            column = own_columns[name] = joined(column, name, parts, where=where, kept=kept)
        texts[key] = column
        if column.type != raw.data.column(name).type:
            own_columns[name] = column
        filled &= _filled(cfg, key, column, where, kept)
    label = label_column(cfg)
    if label is not None:
        own_columns[label] = _targets(cfg, opened, label, filled)
    if weights is not None and cfg.dataset.weight is not None:
        own_columns[cfg.dataset.weight] = weights
    # a fingerprint of its own, or one is taken of a copy of the table; the same on all ranks
    names: tuple[Any, ...] = (cfg.dataset.id_column, cfg.type, cfg.label, cfg.labels, cfg.dataset.weight, identity)
    if part is not None:
        own_columns = part.columns(texts, ids, weights, None if label is None else own_columns[label])
        names = (*names, part.identity, text_columns(cfg))
    if parts:
        names = (*names, joined_columns(cfg))
    fingerprint = hashlib.sha256(repr((raw._fingerprint, *names)).encode()).hexdigest()[:16]
    dataset = datasets.Dataset(pa.table(own_columns), fingerprint=fingerprint)
    if part is None:
        others = raw.remove_columns([name for name in own_columns if name in raw.column_names])
        dataset = datasets.concatenate_datasets([others, dataset], axis=1)
    left_out = int(np.count_nonzero(kept)) - int(np.count_nonzero(filled))
    if left_out:
        _say_left_out(where, left_out, "with an empty text")
    if not filled.all():
        dataset = dataset.select(np.flatnonzero(filled))
    if not len(dataset):
        keys = "task.messages" if cfg.messages is not None else "task.text, task.source and task.target"
        raise UserError(f"{where}: every row has an empty text; check {keys}")
    return dataset, filled


def _with_text(cfg: TaskConfig, opened: Opened, kept: np.ndarray) -> np.ndarray:
    """Which of the rows that are ``kept`` (N,) have a text."""
    filled = copied(kept)
    for key, name in text_columns(cfg).items():
        filled &= _filled(cfg, key, _text_of(opened.rows, name, key, opened.where), opened.where, kept)
    return filled


def _filled(cfg: TaskConfig, key: str, column: pa.ChunkedArray, where: Origin, kept: np.ndarray) -> np.ndarray:
    """Which rows (N,) have something in a column that must be there; all, of one that need not."""
    name, drop = text_columns(cfg)[key], cfg.dataset.drop_empty
    if key == MESSAGES_KEY:
        return check_conversations(column, name, where=where, kept=kept, may_be_empty=drop)
    if key == TOOLS_KEY:
        check_tools(column, name, where=where, kept=kept)
    found = check_text(column, name, where=where, kept=kept, may_be_empty=drop or key in EMPTY_KEYS)
    return kept if key in EMPTY_KEYS else found


def _say_left_out(where: Origin, rows: int, which: str) -> None:
    log.warning("%s: %d rows %s are left out", printable(str(where)), rows, which)


def _part(
    dataset: datasets.Dataset,
    limit: int | None,
    seed: int,
    split: str,
    *,
    stays: np.ndarray | None = None,
    listed: np.ndarray | None = None,
) -> datasets.Dataset:
    """A random part of ``limit`` rows: files are often sorted, so a head is no sample.

    What a list leaves out is drawn, too, and then left out, so that the other rows are those of a run without the list:
    a list is of a part that somebody has looked at, and another part would be one that nobody has.

    Args:
        stays: the rows of the source that the dataset has, (N,).
        listed: those that a list leaves out, (N,); none: nothing is.
    """
    if limit is None:
        return dataset
    if stays is None or listed is None or not listed.any():
        if limit >= len(dataset):
            return dataset
        return dataset.select(subset_rows(len(dataset), limit, seed=seed, split=split))
    source = np.flatnonzero(stays | listed)
    if limit >= len(source):
        return dataset
    drawn = filled_array(len(stays), bool, False)
    drawn[source[subset_rows(len(source), limit, seed=seed, split=split)]] = True
    return dataset.select(np.flatnonzero(drawn[stays]))


def _targets(cfg: TaskConfig, opened: Opened, label: str, kept: np.ndarray) -> np.ndarray:
    column = opened.rows.data.column(label)
    if cfg.type == "regression":
        return regression_targets(column, where=opened.where, name=label, kept=kept)
    assert cfg.labels is not None, "they are known by now"
    return class_ids(column, cfg.labels, where=opened.where, name=label, names=opened.classes, kept=kept)


def check_declared_labels(cfg: TaskConfig) -> None:
    if cfg.type != "classification" or cfg.labels is None:
        return
    if cfg.num_labels < 2:
        raise UserError(f"task.labels={cfg.labels!r}: a classification task needs at least two classes")
    if isinstance(cfg.labels, list) and len(set(cfg.labels)) < len(cfg.labels):
        raise UserError(f"task.labels={cfg.labels!r}: a class is named twice; name each once")
