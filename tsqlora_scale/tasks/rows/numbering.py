"""What the numbers of a label column stand for, which must be the same wherever labels are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.task_section import TaskConfig
from tsqlora_scale.tasks.rows.label_cells import has_places
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.sources import Opened


@dataclass(frozen=True)
class Numbering:
    """Of some rows' labels.

    Attributes:
        classes: names that the data brings along, whose places its numbers are; None: it has none.
        by_place: whether it has none and some cell is a place in ``task.labels``, not a name of it.
    """

    classes: list[str] | None = None
    by_place: bool = False

    @classmethod
    def opened_as(cls, cfg: TaskConfig, opened: Opened, kept: Callable[[], np.ndarray]) -> Numbering:
        """Of what was opened; of labels that are no list of the config's own there is nothing to compare.

        Args:
            kept: the rows that count, (N,) bool, where it is asked.
        """
        if cfg.type != "classification" or opened.classes is not None or not isinstance(cfg.labels, list):
            return cls(opened.classes)
        assert cfg.label is not None
        column = opened.rows.data.column(cfg.label)
        return cls(None, has_places(column, cfg.labels, where=opened.where, name=cfg.label, kept=kept()))

    def joined(self, other: Numbering) -> Numbering:
        """Of these rows and others, which have been checked against these."""
        return Numbering(self.classes or other.classes, self.by_place or other.by_place)


def check_numbered_alike(cfg: TaskConfig, where: Origin, own: Numbering, pool: Numbering) -> None:
    """Label numbers must stand for the same classes in some rows, of ``where``, and in those of the pool.

    Raises:
        UserError: they do not, by the class names that both bring with them, or by those that one has and the places in
            ``task.labels`` that the other one's cells are.
    """
    if cfg.type != "classification":
        return
    declared = list(cfg.labels) if isinstance(cfg.labels, list) else []
    known = own.classes is not None and pool.classes is not None and own.classes != pool.classes
    if known and not set(declared) & set(pool.classes or ()):  # else they are matched by name
        raise UserError(
            f"{where}: its label numbers stand for {own.classes}, those of the pool for {pool.classes}; set "
            "task.labels to these names, by which both are then matched"
        )
    for names, by_place in ((own.classes, pool.by_place), (pool.classes, own.by_place)):
        if names is None or not by_place or not set(declared) & set(names):
            continue
        if any(name != place for name, place in zip(names, declared, strict=False)):
            ours, theirs = (names, declared) if names is own.classes else (declared, names)
            raise UserError(
                f"{where}: its label numbers stand for {ours}, those of the pool for {theirs}: the ones have names of "
                "their own, and the others are places in task.labels; write these by name, or list task.labels in the "
                f"order of {names}, if it is theirs"
            )
