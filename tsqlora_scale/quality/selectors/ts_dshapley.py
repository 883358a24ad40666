"""``sampling.selector: ts_dshapley``: Shapley values under a small model, transferred to the one that is trained.

Schoch et al., *Data Selection for Fine-tuning Large Language Models Using Transferred Shapley Values*, 2306.10165: the
values are those of a cheap classifier on the language model's frozen features, and what has low values is left out.
Theirs is linear, its values estimated by truncated Monte Carlo over chains of subsets. Here it is the classifier of
the K nearest neighbours, whose Shapley values have a closed form (Jia et al., *Efficient Task-Specific Data Valuation
for Nearest Neighbor Algorithms*, 1908.08619, Theorem 1): exact, nothing to draw, a sort a valuing row.

Valued on the query's rows where there is a query, else on a random part of the pool, no row of it by itself.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, filled, positions
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.quality.draws.key_order import smallest
from tsqlora_scale.quality.features.unit_features import unit_features
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.selectors.forward_selector import ForwardSelector
from tsqlora_scale.quality.selectors.ranked import Rating

#: Neighbours that answer together, and rows of the pool that value the others where there is no query.
NEIGHBOURS, VALUING = 5, 500


class TransferredShapleySelector(ForwardSelector):
    """Keeps the highest Shapley values of the nearest neighbours' answers.

    A neighbour's answer is right by 1 or 0 (classes), by a bell curve of the pool's deviation around the right number,
    or by the cosine of the two texts' states.
    """

    def rate(self, module: nn.Module) -> Rating:
        """One forward pass over pool and query."""
        numbers, wanted, shape = self.features(module)

        def found() -> np.ndarray:
            players = numbers[: self.choices]
            values = np.empty(len(numbers))
            values[: self.choices] = self._values(players, wanted, shape)
            values[self.choices :] = values[: self.choices].max()
            return values

        return Rating(self.context.world.from_main(found))

    def _values(self, players: np.ndarray, wanted: np.ndarray, shape: Shape) -> np.ndarray:
        features, answers = unit_features(players, shape, pool=players)
        if len(wanted):
            of_valuing, right = unit_features(wanted, shape, pool=players)
            own = np.full(len(wanted), -1)
        else:
            own = valuing_rows(len(players), VALUING, seed=self.config.run.seed)
            of_valuing, right = features[own], answers[own]
        deviation = float(answers.std()) or 1.0
        total, games = np.zeros(len(players)), filled(len(players), np.int64, len(own))
        for number, me in enumerate(own):
            likeness = _products(features[:, 0], of_valuing[number, 0])
            if shape.kind == "classes":
                match = (answers == right[number]).astype(np.float64)
            elif shape.kind == "number":
                match = np.exp(-0.5 * np.square((answers - right[number]) / deviation))
            else:
                match = _products(features[:, 1], of_valuing[number, 1])
            others = np.arange(len(players)) != me
            total[others] += neighbour_values(likeness[others], match[others], NEIGHBOURS)
            if me >= 0:
                games[me] -= 1
        values: np.ndarray = total / np.maximum(games, 1)
        return values


def neighbour_values(likeness: np.ndarray, match: np.ndarray, neighbours: int) -> np.ndarray:
    """Shapley values (n,) in the game of the K nearest: ``v(S) = sum of match over the K of S that are nearest / K``.

    Args:
        likeness: of the players to the row that values them, (n,); of equal ones the earlier is nearer.
        match: how right the players' answers are, (n,), any numbers.
        neighbours: K.
    """
    order = np.argsort(-likeness, kind="stable")
    a, size = match[order].astype(np.float64), len(match)
    values = np.empty(size)
    if not size:
        return values
    places = np.arange(1, size)
    steps = (a[:-1] - a[1:]) / neighbours * np.minimum(neighbours, places) / places
    ordered = np.append(np.cumsum(steps[::-1])[::-1], 0.0) + a[-1] * min(neighbours, size) / (neighbours * size)
    values[order] = ordered
    return values


def valuing_rows(size: int, count: int, *, seed: int) -> np.ndarray:
    """A random part of a pool of ``size``, at most ``count`` and at most half of it, ascending."""
    return positions(smallest(uniform(philox(seed, "valuing rows"), size), min(count, max(size // 2, 1))))


def _products(features: np.ndarray, one: np.ndarray) -> np.ndarray:
    products = np.empty(len(features))
    for block in blocks(len(features), 2**16):
        products[block] = features[block] @ one
    return products
