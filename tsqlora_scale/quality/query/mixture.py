"""A pool as a mixture of what is wanted and the rest, the wanted part anchored in the query (docs/method.md).

``p(x, y) = pi q(x, y) + (1 - pi) h(x, y)``. The first look compares q with p; here both parts are fitted, in turn with
the probability of every row that it is of the wanted one. Rows of the pool that are probably wanted teach what the
query has too few rows to teach, and what the rest is taken for is no longer blurred by the wanted rows in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tsqlora_scale.quality.query.answer_models import AnswerModel, fit_answers, normal_density
from tsqlora_scale.quality.query.density_ratio import DensityRatio
from tsqlora_scale.quality.query.fits import probability, sides
from tsqlora_scale.quality.query.terms import Likeness

#: Fits of both parts. On pools of 2,000 rows eight change what four have found by less than the draw of the query does.
ROUNDS = 5
#: Leading directions of the features, of all layers together: a ridge on 2,000 rows tells no more apart, and they make
#: a round cost milliseconds.
DIRECTIONS = 256
#: No row is quite surely wanted or not, by its text (from, to) or with its answer (off 0 and 1 by the first).
BY_TEXT, DOUBT = (1e-3, 0.98), 1e-3


@dataclass(frozen=True)
class Mixture:
    """Two parts of a pool: models of the answers of both, and how the share of the wanted one goes with the text.

    Attributes:
        likeness: standardises features.
        directions: of every layer, (L, d, k).
        wanted, rest: models of the answers.
        by_text: of the text term alone, query against pool.
        share: of the pool that is wanted.
        handicap: of the wanted part's model, (nats a row): see :meth:`fit`.
        usual: of answers whatever the text: log shares of classes (C,), or mean and deviation of numbers (2,).
        classes: None for numbers.
    """

    likeness: Likeness
    directions: np.ndarray
    wanted: AnswerModel
    rest: AnswerModel
    by_text: DensityRatio
    share: float
    handicap: float
    usual: np.ndarray
    classes: int | None

    #: ``pool_gain``: by how much the text makes the answer likelier in the pool, ``log p(y|x) - log p(y)``.
    names: ClassVar[tuple[str, ...]] = ("log_wanted", "log_rest", "pool_gain")

    @classmethod
    def fit(
        cls,
        likeness: Likeness,
        features: tuple[np.ndarray, np.ndarray],
        answers: tuple[np.ndarray, np.ndarray],
        first: tuple[np.ndarray, np.ndarray],
        wanted: np.ndarray,
        *,
        copies: np.ndarray | None = None,
        classes: int | None,
    ) -> tuple[Mixture, np.ndarray, np.ndarray]:
        """The mixture; and the values of :attr:`names` for the pool's rows (N, 3) and the query's (n, 3), no row by
        what has seen it.

        Of wanted rows the wanted part's model is in the mean no worse than the other's; but it has learned from fewer
        rows. Where it is worse on the query's, left out, both count as equal there: else the share would shrink with
        every round wherever both parts follow one rule.

        Args:
            features: of the pool (N, L, 1, d), and of the query (n, L, 1, d).
            answers: the same, (N,) and (n,): class ids int64, or numbers float64.
            first: values of the first look's terms, of which the first is the text's and the third ``log p(y|x)``.
            wanted: the probability that a row of the pool is wanted (N,), by the first look.
            copies: see :func:`.fit_terms`.
            classes: None for numbers.
        """
        scaled = [likeness.standardised(part)[:, :, 0] for part in features]
        directions = leading(scaled, DIRECTIONS)
        x, z = (_projected(part, directions) for part in scaled)
        of_pool, of_query = first
        by_text = DensityRatio.fit(of_pool[:, :1], of_query[:, :1], rising=(True,))
        text = by_text.log_ratio(of_pool[:, :1])
        everything, y = np.concatenate([x, z]), np.concatenate(answers)
        queried = np.arange(len(x), len(everything))
        of_pool_copies, _ = sides(copies, len(x))
        sure = np.clip(wanted, DOUBT, 1 - DOUBT)
        for _ in range(ROUNDS):
            share = float(sure.mean())
            weights = np.concatenate([sure, np.ones(len(z))])
            model, log_wanted = fit_answers(everything, y, weights, judged=queried, copies=copies, classes=classes)
            rest, log_rest = fit_answers(x, answers[0], 1 - sure, copies=of_pool_copies, classes=classes)
            of_rest = rest.log_likelihood(z, answers[1])
            handicap = max(float((of_rest - log_wanted[len(x) :]).mean()), 0.0)
            odds = prior_odds(text, share) + log_wanted[: len(x)] + handicap - log_rest
            sure = np.clip(probability(odds), DOUBT, 1 - DOUBT)
        usual = _usual(answers[0], classes)
        mixture = cls(likeness, directions, model, rest, by_text, share, handicap, usual, classes)
        gains = [part[:, 2] - mixture._marginal(known) for part, known in zip(first, answers, strict=True)]
        of_pool = np.column_stack([log_wanted[: len(x)], log_rest, gains[0]])
        return mixture, of_pool, np.column_stack([log_wanted[len(x) :], of_rest, gains[1]])

    def values(self, features: np.ndarray, answers: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        """Of rows that no model has seen, (n, 3), from features (n, L, 1, d), answers (n,) and ``log p(y|x)`` (n,)."""
        x = _projected(self.likeness.standardised(features)[:, :, 0], self.directions)
        fits = [model.log_likelihood(x, answers) for model in (self.wanted, self.rest)]
        return np.column_stack([*fits, log_p - self._marginal(answers)])

    def log_odds(self, text_term: np.ndarray, values: np.ndarray) -> np.ndarray:
        """That rows are wanted, (n,), from their text term (n,) and :meth:`values` (n, 3)."""
        prior = prior_odds(self.by_text.log_ratio(text_term[:, None]), self.share)
        odds: np.ndarray = prior + values[:, 0] + self.handicap - values[:, 1]
        return odds

    def _marginal(self, answers: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return normal_density(answers - self.usual[0], float(self.usual[1]))
        found: np.ndarray = self.usual[answers.astype(np.int64)]
        return found


def prior_odds(log_ratio: np.ndarray, share: float) -> np.ndarray:
    """Log odds (n,) that rows are wanted by their texts, of log ratios (n,) of query to pool: the probability is
    ``share q(x) / p(x)``, which can be no more than 1."""
    low, high = np.log(BY_TEXT)
    likely = np.exp(np.clip(log_ratio + np.log(share), low, high))
    odds: np.ndarray = np.log(likely / (1 - likely))
    return odds


def leading(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Of every layer the directions (L, d, k) in which features (n, L, d) of all ``parts`` differ most; k is the
    layer's share of ``count``, or d."""
    layers, width = parts[0].shape[1:]
    kept = min(max(count // layers, 1), width)
    found = []
    for layer in range(layers):
        squares = sum(part[:, layer].T @ part[:, layer] for part in parts)
        found.append(np.linalg.eigh(squares)[1][:, -kept:])
    return np.stack(found)


def _projected(scaled: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n, 1, L k): one head sees all layers."""
    parts = [scaled[:, layer] @ directions[layer] for layer in range(len(directions))]
    return np.concatenate(parts, 1)[:, None]


def _usual(answers: np.ndarray, classes: int | None) -> np.ndarray:
    if classes is None:
        return np.array([answers.mean(), answers.std() + 1e-9])
    counts = np.bincount(answers, minlength=classes) + 1.0
    logs: np.ndarray = np.log(counts / counts.sum())
    return logs
