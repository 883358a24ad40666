"""What a rated pool is chosen by: how many rows, and the shares of strata among them."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.quality.query.density_ratio import Standing

#: Rows of every class that are added to the query's before its shares are taken: few rows say little of them.
PRIOR = 2
#: Rows that are kept for every one that is estimated to be wanted, where draws are by the probability of being so: the
#: estimate is rough, and what is kept in vain is seldom drawn.
MARGIN = 1.5


def kept_rows(standing: Standing, size: int, *, least: int) -> int:
    """Rows of ``size`` to keep, not fewer than ``least``: all without evidence; :data:`MARGIN` times what a second look
    finds wanted; of what only a first look has seen, the surer part."""
    if not standing.is_evident:
        return size
    part = MARGIN * standing.share if standing.by_mixture else surer_part(standing.share)
    return min(size, max(round(part * size), least))


def surer_part(share: float) -> float:
    """Share of the pool to keep where ``share`` of it is estimated to be wanted: ``share (1 + share^2) / 2``.

    The margin of a choice is where it errs, the more the fewer rows are wanted; where nearly all are, nearly all are
    kept. It suits a choice by texts. A choice by ``log q(y|x) / p(y|x)`` must not be cut so: its surest rows are those
    whose answers are *against* the pool's rule, and a model that is trained on these learns the rule's opposite.
    """
    return share * (1 + share**2) / 2


def strata_of(classes: np.ndarray | None, agrees: np.ndarray | None) -> np.ndarray | None:
    """Numbers from 0 of the strata of rows, (n,) int64: the class, and whether the pool expects it there; None of rows
    that have neither."""
    if agrees is None:
        return None if classes is None else classes.astype(np.int64)
    halves = agrees.astype(np.int64)
    return halves if classes is None else 2 * classes.astype(np.int64) + halves


def strata_shares(wanted: np.ndarray, count: int, *, halved: bool) -> np.ndarray:
    """Shares of ``count`` strata in S up to a constant, (count or more,): those of the query's ``wanted`` (n,).

    That a model of the pool expects a wanted row's answer as often in S as in the query makes S no more a lesson in the
    pool's rule, or against it, than the wanted task is.

    Args:
        halved: whether there are two strata a class.
    """
    return np.bincount(wanted, minlength=count) + PRIOR / (2.0 if halved else 1.0)
