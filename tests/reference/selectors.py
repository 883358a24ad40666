"""The papers' selectors, plainly: one sample after another, and whatever takes long."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tsqlora_scale.engine.train_state import ParamState


def neighbours_worth(likeness: np.ndarray, match: np.ndarray, members: Sequence[int], neighbours: int) -> float:
    """What a set of players is worth to a row: the sum of match over its nearest, divided by K."""
    nearest = sorted(members, key=lambda player: (-likeness[player], player))[:neighbours]
    return float(sum(match[player] for player in nearest) / neighbours)


def shapley_values(likeness: np.ndarray, match: np.ndarray, neighbours: int) -> np.ndarray:
    """By the definition: what a player adds, mean over all orders in which the players may come."""
    size = len(match)
    values = np.zeros(size)
    for order in itertools.permutations(range(size)):
        for place, player in enumerate(order):
            before = neighbours_worth(likeness, match, order[:place], neighbours)
            values[player] += neighbours_worth(likeness, match, order[: place + 1], neighbours) - before
    return values / math.factorial(size)


def in_turn(likeness: np.ndarray, count: int) -> list[int]:
    """One pick after another, each by a look at all that are left."""
    left, picks = list(range(len(likeness))), []
    for number in range(count):
        row = number % likeness.shape[1]
        best = max(left, key=lambda sample: (likeness[sample, row], -sample))
        left.remove(best)
        picks.append(best)
    return picks


def k_centers(features: np.ndarray, centers: np.ndarray, count: int) -> list[int]:
    """All distances to all centers, anew for every choice."""
    chosen: list[int] = []
    points = features.astype(np.float64)
    for _ in range(count):
        taken = [*centers.astype(np.float64), *(points[i] for i in chosen)]
        left = [i for i in range(len(points)) if i not in chosen]
        if taken:
            chosen.append(max(left, key=lambda i: (min(math.dist(points[i], c) for c in taken), -i)))
        else:
            chosen.append(min(left, key=lambda i: (math.dist(points[i], points.mean(0)), i)))
    return chosen


def covering_radius(features: np.ndarray, centers: Sequence[int]) -> float:
    """The largest distance of a sample to the next center."""
    return max(min(math.dist(point, features[c]) for c in centers) for point in features)


def dsir_log_weight(
    text: Sequence[str], pool: Sequence[Sequence[str]], query: Sequence[Sequence[str]], size: int
) -> float:
    """Log ratio of a text's likelihoods in two bags of ``size`` different words and pairs, smoothed by one.

    Args:
        text: its words.
        pool, query: the words of their texts.
    """

    def grams(words: Sequence[str]) -> list[str]:
        return list(words) + [f"{a} {b}" for a, b in itertools.pairwise(words)]

    bags = [Counter(gram for words in texts for gram in grams(words)) for texts in (query, pool)]
    wanted, common = (
        sum(math.log((bag[gram] + 1) / (sum(bag.values()) + size)) for gram in grams(text)) for bag in bags
    )
    return wanted - common


def lexical_diversity(words: Sequence[str]) -> float:
    """MTLD as McCarthy and Jarvis describe it: full factors, and a part of one at the end, in both directions."""

    def one_way(words: Sequence[str]) -> float:
        factors, start = 0.0, 0
        for end in range(1, len(words) + 1):
            stretch = words[start:end]
            if len(set(stretch)) / len(stretch) <= 0.72:
                factors, start = factors + 1, end
        rest = words[start:]
        if rest:
            factors += (1 - len(set(rest)) / len(rest)) / (1 - 0.72)
        return len(words) / factors if factors else float(len(words))

    return (one_way(words) + one_way(list(reversed(words)))) / 2


def ridge_answers(features: np.ndarray, answers: np.ndarray, of: np.ndarray, ridge: float) -> np.ndarray:
    """By the normal equations: least squares with a ridge of ``ridge`` times the number of samples."""
    x, level = features.astype(np.float64), answers.mean(0)
    weights = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ (answers - level))
    return np.asarray(of.astype(np.float64) @ weights + level)


def own_gradients(module: nn.Module, losses, batch) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Gradients of the adapter's factors of one sample, by autograd."""
    module.eval()
    factors = [p for name, p in module.named_parameters() if "lora_" in name]
    (loss,) = losses(module, batch)
    return list(torch.autograd.grad(loss, factors))


def after_steps_of_torch(gradients: Sequence[torch.Tensor], betas: tuple[float, float], eps: float) -> ParamState:
    """A parameter that starts at zero, and its moments, after torch's Adam has had these gradients."""
    parameter = torch.zeros(3, 4, dtype=torch.float64)
    mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
    if gradients:
        optimizer = torch.optim.Adam([parameter], lr=0.1, betas=betas, eps=eps)
        for gradient in gradients:
            parameter.grad = gradient.double()
            optimizer.step()
        mean, square = optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]
    return ParamState(parameter.float(), mean.float(), square.float())


def step_by_torch(
    state: ParamState, steps: int, gradient: torch.Tensor, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """What a step of torch's Adam by one gradient takes off a parameter, at a learning rate of 1."""
    parameter = torch.zeros_like(state.value, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=eps)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(steps)),
        "exp_avg": state.exp_avg.double(),
        "exp_avg_sq": state.exp_avg_sq.double(),
    }
    parameter.grad = gradient.double()
    optimizer.step()
    return -parameter.float()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 0 where either is zero."""
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def error_length(logits: Sequence[float], label: int) -> float:
    """Distance of the probabilities to the label's corner."""
    largest = max(logits)
    odds = [math.exp(value - largest) for value in logits]
    return math.sqrt(sum((odd / sum(odds) - (place == label)) ** 2 for place, odd in enumerate(odds)))


def cosines_within(pool: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """Cosines of what of each row lies in the leading eigenvectors of the query's second moments, pair by pair."""
    moments = sum(np.outer(row, row) for row in query.astype(np.float64))
    values, vectors = np.linalg.eigh(moments)
    leading = [vectors[:, i] for i in np.argsort(-values)[:count]]

    def inside(row: np.ndarray) -> np.ndarray:
        return sum(float(row @ vector) * vector for vector in leading)  # type: ignore[return-value]

    return np.array([[cosine(inside(one), inside(other)) for other in query] for one in pool])


def kept_of_the_known(losses: Sequence[float], skips: Sequence[bool]) -> list[float]:
    """InfoBatch: how much each sample counts in an epoch; a sample below the mean is skipped where its coin says so."""
    known = [loss for loss in losses if not math.isnan(loss)]
    mean = sum(known) / len(known) if known else math.nan
    return [1.0 if not loss < mean else 0.0 if skip else 2.0 for loss, skip in zip(losses, skips, strict=True)]
