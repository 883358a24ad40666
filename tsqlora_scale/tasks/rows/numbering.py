"""What the numbers of a label column stand for, which must be the same wherever labels are read."""

from __future__ import annotations

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
        classes: names that the data brings along, whose places its numbers are: a list of every data set that has some.
        by_place: whether some cell, of a data set that has none, is a place in ``task.labels``, not a name of it.
    """

    classes: tuple[list[str], ...] = ()
    by_place: bool = False

    @classmethod
    def opened_as(cls, cfg: TaskConfig, opened: Opened, kept: np.ndarray) -> Numbering:
        """Of what was opened; of labels that are no list of the config's own there is nothing to compare.

        Args:
            kept: the rows that count, (N,) bool.
        """
        if opened.classes is not None:
            return cls((opened.classes,))
        if cfg.type != "classification" or not isinstance(cfg.labels, list):
            return cls()
        assert cfg.label is not None
        column = opened.rows.data.column(cfg.label)
        return cls((), has_places(column, cfg.labels, where=opened.where, name=cfg.label, kept=kept))

    def joined(self, other: Numbering) -> Numbering:
        """Of these rows and others, which have been checked against these."""
        more = tuple(classes for classes in other.classes if classes not in self.classes)
        return Numbering(self.classes + more, self.by_place or other.by_place)


def check_numbered_alike(cfg: TaskConfig, where: Origin, own: Numbering, pool: Numbering) -> None:
    """Label numbers must stand for the same classes in some rows, of ``where``, and in those of the pool.

    Names that ``task.labels`` has are matched by name, in whatever order they are; other names, and cells of data
    without names, count by their place.

    Raises:
        UserError: they do not, by the class names that both bring with them, or by those that one has and the places in
            ``task.labels`` that the other one's cells are.
    """
    if cfg.type != "classification":
        return
    declared = list(cfg.labels) if isinstance(cfg.labels, list) else []
    for ours in own.classes:
        for theirs in pool.classes:
            if ours != theirs and not set(declared) & set(theirs):
                raise UserError(
                    f"{where}: its label numbers stand for {ours}, those of the pool for {theirs}; set task.labels to "
                    "these names, by which both are then matched"
                )
    for all_names, by_place, are_ours in ((own.classes, pool.by_place, True), (pool.classes, own.by_place, False)):
        for names in all_names if by_place else ():
            by_name = bool(set(declared) & set(names))
            if by_name and any(name != place for name, place in zip(names, declared, strict=False)):
                ours, theirs = (names, declared) if are_ours else (declared, names)
                raise UserError(
                    f"{where}: its label numbers stand for {ours}, those of the pool for {theirs}: the ones have names "
                    "of their own, and the others are places in task.labels; write these by name, or list task.labels "
                    f"in the order of {names}, if it is theirs"
                )
