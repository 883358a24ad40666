"""From the config to the checked pool and held-out sets: of one data set, or of a mixture of several."""

from __future__ import annotations

import datasets

from tsqlora_scale.common.errors import UserError, naming
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.config.task_section import MixedSetConfig
from tsqlora_scale.tasks.metrics import check_metrics
from tsqlora_scale.tasks.rows.data import (
    Data,
    check_classes_known,
    check_declared_labels,
    label_column,
    load_dev_set,
    load_pool,
    load_query,
    wanted_columns,
)
from tsqlora_scale.tasks.rows.numbering import Numbering, check_numbered_alike
from tsqlora_scale.tasks.rows.set_columns import SetColumns
from tsqlora_scale.tasks.rows.sources import open_pool

#: A pool, the classes in it, and what its label numbers stand for.
Pooled = tuple[datasets.Dataset, list[str] | int | None, Numbering]


def load_dev(cfg: TaskConfig, *, seed: int) -> Data:
    """The held-out sets alone, opened and checked; the pool is left without rows, and its file need not be there.

    Raises:
        UserError: as :func:`load_data`, there is no held-out set, or the config names no classes: those of a held-out
            set may be others than the pool's.
    """
    check_metrics(cfg.metrics, cfg.type)
    check_declared_labels(cfg)
    check_classes_known(cfg)
    sets = _load_dev_sets(cfg, seed)
    if not sets:
        if cfg.mixture:
            raise UserError("task.mixture: no set of it has a held-out one, and evaluation needs it; name a dev_file")
        key = "dev_file" if cfg.dataset.name is None else "dev_split"
        raise UserError(f"task.dataset.{key} is not set, and evaluation needs it; name the held-out set")
    dev, more = _first_and_more(sets)
    assert dev is not None
    return Data(dev.select([]), dev, more, cfg.labels)


def load_data(cfg: TaskConfig, *, seed: int) -> Data:
    """Open and check all splits.

    Args:
        cfg: the task.
        seed: fixes the subsets that ``max_train_samples`` and ``max_dev_samples`` keep. A smaller subset is
            part of a larger one of the same seed.

    Raises:
        UserError: one line that names the key, or the file and row (from 1, without the header), the value
            and the remedy.
    """
    check_metrics(cfg.metrics, cfg.type)
    check_declared_labels(cfg)
    train, labels, numbering = _load_mixture(cfg, seed) if cfg.mixture else _load_one(cfg, seed)
    cfg = cfg.model_copy(update={"labels": labels})
    sets = _load_dev_sets(cfg, seed, numbering)
    dev, more = _first_and_more(sets)
    query = None if cfg.query is None else load_query(cfg, train, sets, numbering)
    return Data(train, dev, more, labels, query)


def _load_one(cfg: TaskConfig, seed: int) -> Pooled:
    opened = open_pool(cfg.dataset, wanted_columns(cfg, pool=True), label=label_column(cfg))
    return load_pool(cfg, opened, seed)


def _load_mixture(cfg: TaskConfig, seed: int) -> Pooled:
    """The pools of all sets, one behind the other in the order of the config.

    Raises:
        UserError: naming the set, also where its classes are not those of the others.
    """
    pools: list[datasets.Dataset] = []
    labels, numbering = cfg.labels, Numbering()
    for each in cfg.mixture:
        with naming(_key(each)):
            own = cfg.of_set(each)
            opened = open_pool(own.dataset, wanted_columns(own, pool=True), label=label_column(own))
            rows, found, of_set = load_pool(own, opened, seed, _part(cfg, each, is_pool=True))
            check_numbered_alike(own, opened.where, of_set, numbering)
            labels = found if labels is None else labels
            if found != labels:
                raise UserError(
                    f"its classes are {found}, those of {cfg.mixture[0].name!r} {labels}; set task.labels to the names "
                    "of all"
                )
        numbering = numbering.joined(of_set)
        pools.append(rows)
    return datasets.concatenate_datasets(pools), labels, numbering


def _load_dev_sets(cfg: TaskConfig, seed: int, numbering: Numbering | None = None) -> dict[str, datasets.Dataset]:
    """The checked held-out sets by name.

    Args:
        numbering: what the pool's label numbers stand for.
    """
    sets = {}
    for title, (each, name) in cfg.dev_sets.items():
        if each is None:
            sets[title] = load_dev_set(cfg, name, seed, numbering)
            continue
        with naming(_key(each)):
            sets[title] = load_dev_set(cfg.of_set(each), name, seed, numbering, _part(cfg, each, is_pool=False))
    return sets


def _part(cfg: TaskConfig, each: MixedSetConfig, *, is_pool: bool) -> SetColumns:
    number = [other.name for other in cfg.mixture].index(each.name)
    return SetColumns(cfg, each.name, number, each.prefix, is_pool)


def _key(each: MixedSetConfig) -> str:
    return f"task.mixture, {each.name!r}"


def _first_and_more(
    sets: dict[str, datasets.Dataset],
) -> tuple[datasets.Dataset | None, dict[str, datasets.Dataset]]:
    first = next(iter(sets), None)
    return sets.get(first or ""), {name: rows for name, rows in sets.items() if name != first}
