"""Components chosen the obvious way, and their importances from the whole history of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqlora_scale.ranks.policies.elalora import Exchange


def ada_kept(components: Mapping[str, tuple[float, ...]], budget: int, r_min: int) -> dict[str, tuple[int, ...]]:
    """Take the least important component away, one at a time, where its layer has more than ``r_min``; of two equals
    the one of the later layer, and in it the later one."""
    left = {name: list(range(len(scores))) for name, scores in components.items()}
    names = list(components)
    while sum(map(len, left.values())) > budget:
        removable = [
            (components[name][k], -names.index(name), -k)
            for name in names
            if len(left[name]) > r_min
            for k in left[name]
        ]
        if not removable:
            break
        _, place, k = min(removable)
        left[names[-place]].remove(-k)
    return {name: tuple(kept) for name, kept in left.items()}


def ela_exchange(
    components: Mapping[str, tuple[float, ...]], count: int, candidates: int, r_min: int, r_max: int
) -> Exchange:
    """One pair after another, each chosen by looking at the whole pool anew."""
    names = list(components)
    pool = []
    for place, name in enumerate(names):
        ordered = sorted((score, k) for k, score in enumerate(components[name]))
        pool += [(score, place, k) for score, k in ordered[:candidates]]
    ranks = [len(components[name]) for name in names]
    dropped, expanded = [], []
    lowest, highest = None, None
    for _ in range(count):
        free = [one for one in pool if (lowest is None or one > lowest) and (highest is None or one < highest)]
        losing = [one for one in free if ranks[one[1]] > r_min]
        if not losing:
            break
        loser = min(losing)
        after = [rank - (place == loser[1]) for place, rank in enumerate(ranks)]
        winning = [one for one in free if one > loser and after[one[1]] < r_max]
        if not winning:
            break
        winner = max(winning)
        ranks = [rank + (place == winner[1]) for place, rank in enumerate(after)]
        dropped.append((names[loser[1]], loser[2]))
        expanded.append(names[winner[1]])
        lowest, highest = loser, winner
    return Exchange(tuple(dropped), tuple(expanded))


def smoothed(history: Sequence[Sequence[Tensor]], beta_1: float, beta_2: float) -> Tensor:
    """(r,): importances of components from those of every step and parameter, (r, d) each, all of one age.

    Averages from zero as sums over the history, corrected by what their weights sum to.
    """
    steps = len(history)
    total = torch.zeros(len(history[0][0]))
    for parts in zip(*history, strict=True):
        means = [sum((1 - beta_1) * beta_1 ** (t - s) * parts[s] for s in range(t + 1)) for t in range(steps)]
        deviation = sum((1 - beta_2) * beta_2 ** (steps - 1 - t) * (parts[t] - means[t]).abs() for t in range(steps))
        total += (means[-1] * deviation).mean(1)
    return total / ((1 - beta_1**steps) * (1 - beta_2**steps))
