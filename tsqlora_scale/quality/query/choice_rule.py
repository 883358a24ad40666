"""What a rated pool is chosen by: how many rows, and the shares of strata among them."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.quality.query.density_ratio import Standing

#: Rows for every stratum of the query's that are added to these before shares are taken: few rows say little of them.
PRIOR = 1.0
#: Rows that are kept for every one that is estimated to be wanted, where draws are by the probability of being so: the
#: estimate is rough, and what is kept in vain is seldom drawn.
MARGIN = 1.5


def kept_rows(standing: Standing, size: int, *, least: int, soft: bool = True) -> int:
    """Rows of ``size`` to keep, not fewer than ``least``: all without evidence; what a second look finds wanted,
    :data:`MARGIN` times that for ``soft`` draws; of what only a first look has seen, the surer part."""
    if not standing.is_evident:
        return size
    part = surer_part(standing.share)
    if standing.by_mixture:
        part = standing.share * (MARGIN if soft else 1.0)
    return min(size, max(round(part * size), least))


def surer_part(share: float) -> float:
    """Share of the pool to keep where ``share`` of it is estimated to be wanted: ``share (1 + share^2) / 2``.

    The margin of a choice is where it errs, the more the fewer rows are wanted; where nearly all are, nearly all are
    kept. It suits a choice by texts. A choice by ``log q(y|x) / p(y|x)`` must not be cut so: its surest rows are those
    whose answers are *against* the pool's rule, and a model that is trained on these learns the rule's opposite.
    """
    return share * (1 + share**2) / 2


def balanced(
    classes: tuple[np.ndarray | None, np.ndarray | None],
    agrees: tuple[np.ndarray, np.ndarray] | None,
    wanted: np.ndarray,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The strata of the pool's rows, (N,), and their shares in S, (k,); None of both where all rows are alike.

    Args:
        classes: class ids of the pool's rows (N,) and of the query's (n,); None where there are none.
        agrees: whether the pool expects their answers, of the same rows.
        wanted: the probability that a row of the pool is, (M,): of the first M rows, without those of the query in it.
    """
    pairs = zip(classes, agrees or (None, None), strict=True)
    of_pool, of_query = (strata_of(*pair) for pair in pairs)
    if of_pool is None or of_query is None:
        return None, None
    return of_pool, strata_shares(of_query, likely_rows(of_pool[: len(wanted)], wanted))


def strata_of(classes: np.ndarray | None, agrees: np.ndarray | None) -> np.ndarray | None:
    """Numbers from 0 of the strata of rows, (n,) int32: the class, and whether the pool expects it there; None of rows
    that have neither."""
    known = classes if agrees is None else agrees
    if known is None:
        return None
    strata = new_array(len(known), np.int32)
    for block in blocks(len(known)):
        halves = 0 if agrees is None else agrees[block].astype(np.int32)
        whole = 0 if classes is None else classes[block].astype(np.int32) * (1 if agrees is None else 2)
        strata[block] = whole + halves
    return strata


def strata_shares(wanted: np.ndarray, likely: np.ndarray) -> np.ndarray:
    """Shares of strata in S up to a constant, (k,): those of the query's ``wanted`` (n,), and a few rows more that are
    spread as the pool's wanted rows probably are.

    That a model of the pool expects a wanted row's answer as often in S as in the query makes S no more a lesson in the
    pool's rule, or against it, than the wanted task is.

    Args:
        likely: how many rows of the pool are probably wanted, by stratum, (k,).
    """
    count = max(len(likely), int(wanted.max()) + 1)
    shares = np.bincount(wanted, minlength=count).astype(np.float64)
    seen = int(np.count_nonzero(shares))
    shares[: len(likely)] += PRIOR * seen * likely / max(float(likely.sum()), 1e-12)
    return shares


def likely_rows(strata: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Sums of probabilities ``wanted`` (N,) by stratum, (k,)."""
    sums = np.zeros(int(strata.max()) + 1)
    for block in blocks(len(strata)):
        sums += np.bincount(strata[block], wanted[block], minlength=len(sums))
    return sums
