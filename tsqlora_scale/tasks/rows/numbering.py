"""What the numbers of a label column stand for, which must be the same wherever labels are read."""

from __future__ import annotations

from dataclasses import dataclass

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.task_section import TaskConfig
from tsqlora_scale.tasks.rows.label_cells import has_places
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
    def opened_as(cls, cfg: TaskConfig, opened: Opened) -> Numbering:
        """Of what was opened; of labels that are no list of the config's own there is nothing to compare."""
        if cfg.type != "classification" or opened.classes is not None or not isinstance(cfg.labels, list):
            return cls(opened.classes)
        assert cfg.label is not None
        column = opened.rows.data.column(cfg.label)
        return cls(None, has_places(column, cfg.labels, where=opened.where, name=cfg.label))

    def __bool__(self) -> bool:
        return self.classes is not None or self.by_place


def check_numbered_alike(cfg: TaskConfig, opened: Opened, pool: Numbering) -> Numbering:
    """Label numbers must stand for the same classes in the pool and in other rows; what they stand for in these.

    Raises:
        UserError: they do not, by the class names that both bring with them, or by those that one has and the places in
            ``task.labels`` that the other one's cells are.
    """
    own = Numbering.opened_as(cfg, opened)
    if cfg.type != "classification":
        return own
    declared = list(cfg.labels) if isinstance(cfg.labels, list) else []
    if own.classes is not None and pool.classes is not None:
        if own.classes != pool.classes and not set(declared) & set(pool.classes):  # else they are matched by name
            raise UserError(
                f"{opened.where}: its label numbers stand for {own.classes}, those of the pool for {pool.classes}; set "
                "task.labels to these names, by which both are then matched"
            )
        return own
    names = own.classes or pool.classes
    if names is not None and (own.by_place or pool.by_place) and set(declared) & set(names) and declared != names:
        ours, theirs = (names, declared) if own.classes is not None else (declared, names)
        raise UserError(
            f"{opened.where}: its label numbers stand for {ours}, those of the pool for {theirs}: one has names of its "
            f"own, and the other one's numbers are places in task.labels; set task.labels={names}"
        )
    return own
