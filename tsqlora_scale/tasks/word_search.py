"""Which words stand for the classes at a prompt's slot: those that the base itself puts there for the training data.

Gao, Fisch and Chen, *Making Pre-trained Language Models Better Few-shot Learners*, 2012.15723, section 5.1: of every
class the words of the largest summed log-probability over its samples, and of these the assignment that answers the
samples best before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Rounds over the classes; each ends better than the last, or is the last.
ROUNDS = 10


def likely_words(sums: Tensor, word_of: Callable[[int], str | None], most: int) -> list[list[int]]:
    """For every class up to ``most`` tokens, the likeliest first, no word twice but for case.

    Args:
        sums: log-probabilities of tokens at the slot, summed over a class's samples, (C, V) float64.
        word_of: the word that a token is; None for one that is none.
    """
    found = []
    for row in sums.round(decimals=6):  # sums over other numbers of ranks round otherwise
        own: dict[str, int] = {}
        for token in torch.sort(row, descending=True, stable=True).indices.tolist():
            word = word_of(token)
            if word is not None:
                own.setdefault(word.casefold(), token)
            if len(own) == most:
                break
        found.append(list(own.values()))
    return found


def best_words(scores: Tensor, labels: Tensor, candidates: Sequence[Sequence[int]]) -> list[int]:
    """For every class one of its candidates, each another, so that the samples are answered best by these words.

    Best is the largest accuracy, and of equal ones the smallest mean cross-entropy over the chosen words. It starts
    from what a class says more than the others do, and changes one class's word at a time for the best there is, until
    no change is better.

    Args:
        scores: log-probabilities (n, K) of tokens at the samples' slots.
        labels: the samples' classes, (n,) int64, all C of them present.
        candidates: of every class columns of ``scores``, more than there are classes.
    """
    scores = scores.double()
    classes = len(candidates)
    means = torch.stack([scores[labels == number].mean(0) for number in range(classes)])
    more = means - (means.sum(0, keepdim=True) - means) / max(classes - 1, 1)
    chosen: list[int] = []
    for number, own in enumerate(candidates):
        free = [column for column in own if column not in chosen]
        chosen.append(max(free, key=lambda column: float(more[number, column])))
    best = judged(scores[:, chosen], labels)
    for _ in range(ROUNDS):
        before = best
        for number, own in enumerate(candidates):
            for column in own:
                if column in chosen:
                    continue
                tried = [*chosen[:number], column, *chosen[number + 1 :]]
                value = judged(scores[:, tried], labels)
                if value > best:
                    best, chosen = value, tried
        if best == before:
            break
    return chosen


def judged(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and mean cross-entropy with its sign turned and rounded, of scores (n, C) and classes (n,)."""
    accuracy = (scores.argmax(1) == labels).double().mean()
    loss = torch.nn.functional.cross_entropy(scores, labels)
    return float(accuracy), round(-float(loss), 9)
