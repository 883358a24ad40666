"""Which fold each sample is in: labels evenly, and samples that are nearly the same together."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.random_streams import philox


def plan_folds(
    groups: np.ndarray, strata: np.ndarray | None, folds: int, *, seed: int, copies: np.ndarray | None = None
) -> np.ndarray:
    """The fold of every sample, (n,) int64: whole groups, every stratum spread as evenly as its groups allow.

    Groups are dealt in random order, large ones first, each to the fold that has the fewest samples of its first
    sample's stratum, and of those to one with the fewest samples. Of a group that is larger than a fold the copies to
    the letter stay together, and where these are that many, too, they are dealt one by one: a text that most of the
    pool has (an instruction, say, whose answers are told apart by nothing) would else leave folds that nothing is
    learned for.

    Args:
        groups: the group of every sample, (n,): what belongs into one fold. See :func:`.copy_groups`.
        strata: the class of every sample, (n,) numbers from 0; None: all alike.
        folds: 2 or more.
        copies: the group of copies to the letter that every sample is in, (n,), within its other group.
    """
    size = len(groups)
    strata = np.zeros(size, dtype=np.int64) if strata is None else np.asarray(strata)
    for finer in (np.arange(size),) if copies is None else (copies, np.arange(size)):
        _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        groups = np.where((sizes > -(-size // folds))[members], size + np.asarray(finer), members)
    _, leaders, members, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((philox(seed, "folds").random(len(leaders)), -sizes))
    of_stratum = np.zeros((int(strata.max(initial=0)) + 1, folds), dtype=np.int64)
    in_all = np.zeros(folds, dtype=np.int64)
    chosen = np.zeros(len(leaders), dtype=np.int64)
    for group in order.tolist():
        stratum, count = strata[leaders[group]], sizes[group]
        fold = int(np.lexsort((np.arange(folds), in_all, of_stratum[stratum]))[0])
        chosen[group] = fold
        of_stratum[stratum, fold] += count
        in_all[fold] += count
    folds_of: np.ndarray = chosen[members]
    return folds_of
