"""The terms of the density ratio: how like the query a row's text is, and how like its answer (docs/method.md).

``log q(x, y) / p(x, y) = log q(x) / p(x) + log q(y|x) / p(y|x)``, with q the wanted task and p the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.quality.query.answer_models import normal_density
from tsqlora_scale.quality.query.feature_heads import Heads, fit_heads
from tsqlora_scale.quality.query.fits import folds_of, log_linear, sides
from tsqlora_scale.quality.query.looks import Shape

#: Parts that the query is cut into, so that the mixture of its heads and the pool's is judged on rows it has not seen.
FOLDS = 8


class Terms(Protocol):
    """Of any row that no model has seen."""

    @property
    def likeness(self) -> Likeness:
        """Of texts."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the m terms."""
        ...

    @property
    def rising(self) -> tuple[bool, ...]:
        """Whether more of a term cannot make a row less wanted, (m,)."""
        ...

    def values(self, features: np.ndarray, last: np.ndarray) -> np.ndarray:
        """(n, m) terms, of features (n, L, R, d) and targets or losses (n,)."""
        ...


@dataclass(frozen=True)
class Likeness:
    """Mean cosine of a row's features to those of the query's rows, mean over the layers.

    Features are standardised over pool and query first: without it all cosines of a layer are nearly alike, and only
    the last layer of a model trained for cosines tells texts apart (on a pool of four tasks the area under the ROC
    curve of MiniLM's middle layers is 0.75 to 0.9 without, 0.97 to 0.99 with it). Over both, so that no row is told
    from the others by having been there: over the pool alone its error would be common to the query's rows, which
    makes them alike.

    Attributes:
        means, deviations: of the features of both, (L, R, d).
        direction: mean over the query's rows of their features scaled to unit length, (L, R, d).
    """

    means: np.ndarray
    deviations: np.ndarray
    direction: np.ndarray

    @classmethod
    def fit(
        cls, pool: np.ndarray, query: np.ndarray, *, copies: np.ndarray | None = None
    ) -> tuple[Likeness, np.ndarray, np.ndarray]:
        """The term; and its values for the pool's rows, (N, R), and the query's, each left out of the mean, (n, R).

        Args:
            copies: numbers of groups of the query's rows that are the same, (n,), left out together; None: all differ.
        """
        both = np.concatenate([pool, query])
        means, deviations = both.mean(0, dtype=np.float64), both.std(0, dtype=np.float64) + 1e-6
        likeness = cls(means, deviations, _unit((query - means) / deviations).mean(0))
        of_query, count = likeness.cosines(query), len(query)
        times = np.ones(count) if copies is None else np.bincount(copies)[copies]
        out = np.minimum(times, count - 1)[:, None]
        return likeness, likeness.cosines(pool), (count * of_query - out) / (count - out)

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Features (n, L, R, d) in units of the deviations."""
        scaled: np.ndarray = (features - self.means) / self.deviations
        return scaled

    def cosines(self, features: np.ndarray) -> np.ndarray:
        """(n, R)."""
        mean: np.ndarray = (_unit(self.standardised(features)) * self.direction).sum(-1).mean(1)
        return mean


def _unit(x: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return scaled


@dataclass(frozen=True)
class LabelTerms:
    """Text term, ``log q(y|x)`` and ``log p(y|x)`` of classes.

    p is told by heads fitted to the pool. q by a log-linear mixture of heads fitted to the query and the pool's: what
    the pool teaches of the wanted labels counts as far as the query's rows, too few to teach it, bear it out.
    """

    likeness: Likeness
    query_heads: Heads
    pool_heads: Heads
    scales: tuple[float, float]
    mixture: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]

    names: ClassVar[tuple[str, ...]] = ("text_term", "log_q", "log_p")
    rising: ClassVar[tuple[bool, ...]] = (True, True, False)

    @classmethod
    def fit(
        cls,
        pool: np.ndarray,
        query: np.ndarray,
        labels: np.ndarray,
        wanted: np.ndarray,
        *,
        copies: np.ndarray | None = None,
        seed: int,
        classes: int = 0,
    ) -> tuple[LabelTerms, np.ndarray, np.ndarray]:
        """The terms; and their values for the pool's rows (N, 3) and the query's (n, 3), no row by what has seen it.

        Args:
            pool, query: features (N, L, 1, d) and (n, L, 1, d).
            labels, wanted: their class ids, (N,) and (n,) int64.
            copies: see :func:`fit_terms`.
            classes: how many there are at least; rows that are not among these may have others.
        """
        own = sides(copies, len(pool))
        likeness, pool_text, query_text = Likeness.fit(pool, query, copies=own[1])
        x, z = likeness.standardised(pool)[:, :, 0], likeness.standardised(query)[:, :, 0]
        one_hot = np.eye(max(classes, int(labels.max()) + 1, int(wanted.max()) + 1))
        pool_heads, pool_by_pool = fit_heads(x, one_hot[labels], copies=own[0])
        query_heads, query_by_query = fit_heads(z, one_hot[wanted], copies=own[1])
        scales = (float(query_by_query.std()) + 1e-9, float(pool_by_pool.std()) + 1e-9)
        both = _logits(query_by_query, pool_heads.scores(z), scales)
        y = torch.from_numpy(wanted)
        held_out = torch.zeros(len(y), len(one_hot), dtype=torch.float64)
        folds = folds_of(wanted, len(wanted), min(FOLDS, len(wanted)), seed=seed, purpose="query folds")
        for fold in np.unique(folds):
            out = torch.from_numpy(folds == fold)
            factors, biases = log_linear(both[~out], y[~out], 1 / int((~out).sum()), left_out=True)
            held_out[out] = both[out] @ factors + biases
        of_pool = torch.from_numpy(pool_by_pool / scales[1])[:, :, None]
        terms = cls(
            likeness, query_heads, pool_heads, scales,
            mixture=log_linear(both, y, 1 / len(y), left_out=True),
            calibration=log_linear(of_pool, torch.from_numpy(labels), 1 / len(labels), left_out=True),
        )  # fmt: skip
        pool_terms = terms._joined(pool_text, query_heads.scores(x), pool_by_pool, labels)
        query_terms = terms._joined(query_text, query_by_query, pool_heads.scores(z), wanted)
        query_terms[:, 1] = _log_likelihood(held_out, wanted)
        return terms, pool_terms, query_terms

    def values(self, features: np.ndarray, last: np.ndarray) -> np.ndarray:
        """See :class:`Terms`."""
        x = self.likeness.standardised(features)[:, :, 0]
        by_query, by_pool = self.query_heads.scores(x), self.pool_heads.scores(x)
        return self._joined(self.likeness.cosines(features), by_query, by_pool, last.astype(np.int64))

    def _joined(self, text: np.ndarray, by_query: np.ndarray, by_pool: np.ndarray, y: np.ndarray) -> np.ndarray:
        both = _logits(by_query, by_pool, self.scales)
        mixed = both @ self.mixture[0] + self.mixture[1]
        calibrated = both[:, :, 1:] @ self.calibration[0] + self.calibration[1]
        return np.column_stack([text[:, 0], _log_likelihood(mixed, y), _log_likelihood(calibrated, y)])


def _logits(by_query: np.ndarray, by_pool: np.ndarray, scales: tuple[float, float]) -> Tensor:
    """(n, C, 2)."""
    return torch.from_numpy(np.stack([by_query / scales[0], by_pool / scales[1]], 2))


def _log_likelihood(logits: Tensor, y: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = torch.log_softmax(logits, 1).numpy()[np.arange(len(y)), y]
    return chosen


@dataclass(frozen=True)
class NumberTerms:
    """Text term, ``log q(y|x)`` and ``log p(y|x)`` of numbers, as normal densities around linear predictions."""

    likeness: Likeness
    query_heads: Heads
    pool_heads: Heads
    mixture: np.ndarray
    deviations: tuple[float, float]

    names: ClassVar[tuple[str, ...]] = ("text_term", "log_q", "log_p")
    rising: ClassVar[tuple[bool, ...]] = (True, True, False)

    @classmethod
    def fit(
        cls,
        pool: np.ndarray,
        query: np.ndarray,
        numbers: np.ndarray,
        wanted: np.ndarray,
        *,
        copies: np.ndarray | None = None,
    ) -> tuple[NumberTerms, np.ndarray, np.ndarray]:
        """As :meth:`LabelTerms.fit`, of numbers (N,) and (n,) float64."""
        own = sides(copies, len(pool))
        likeness, pool_text, query_text = Likeness.fit(pool, query, copies=own[1])
        x, z = likeness.standardised(pool)[:, :, 0], likeness.standardised(query)[:, :, 0]
        pool_heads, pool_by_pool = fit_heads(x, numbers[:, None], copies=own[0])
        query_heads, query_by_query = fit_heads(z, wanted[:, None], copies=own[1])
        both = _design(query_by_query, pool_heads.scores(z))
        # as in every fit here, a row's own value is left out in closed form
        ridge = 1e-2 * np.trace(both.T @ both) / 3 * np.diag([1.0, 1.0, 0.0]) + 1e-9 * np.eye(3)
        inverse = np.linalg.inv(both.T @ both + ridge)
        mixture = inverse @ both.T @ wanted
        leverage = np.minimum(((both @ inverse) * both).sum(1), 1 - 1e-9)
        errors = (wanted - both @ mixture) / (1 - leverage)
        deviations = (
            float(np.sqrt(np.square(errors).mean())) + 1e-9,
            float(np.sqrt(np.square(numbers - pool_by_pool[:, 0]).mean())) + 1e-9,
        )
        terms = cls(likeness, query_heads, pool_heads, mixture, deviations)
        pool_terms = terms._joined(pool_text, query_heads.scores(x), pool_by_pool, numbers)
        query_terms = terms._joined(query_text, query_by_query, pool_heads.scores(z), wanted)
        query_terms[:, 1] = normal_density(errors, deviations[0])
        return terms, pool_terms, query_terms

    def values(self, features: np.ndarray, last: np.ndarray) -> np.ndarray:
        """See :class:`Terms`."""
        x = self.likeness.standardised(features)[:, :, 0]
        by_query, by_pool = self.query_heads.scores(x), self.pool_heads.scores(x)
        return self._joined(self.likeness.cosines(features), by_query, by_pool, last.astype(np.float64))

    def _joined(self, text: np.ndarray, by_query: np.ndarray, by_pool: np.ndarray, y: np.ndarray) -> np.ndarray:
        wanted = normal_density(y - _design(by_query, by_pool) @ self.mixture, self.deviations[0])
        return np.column_stack([text[:, 0], wanted, normal_density(y - by_pool[:, 0], self.deviations[1])])


def _design(by_query: np.ndarray, by_pool: np.ndarray) -> np.ndarray:
    return np.column_stack([by_query[:, 0], by_pool[:, 0], np.ones(len(by_query))])


@dataclass(frozen=True)
class TextTerms:
    """Terms of rows whose answer is a text: likeness of source and target, how near these two are to one another, and
    the base's loss on the target; of the last two also how far they are from what is usual in the query."""

    likeness: Likeness
    usual: np.ndarray

    names: ClassVar[tuple[str, ...]] = ("text_term", "target_term", "pair", "base_loss", "pair_off", "loss_off")
    rising: ClassVar[tuple[bool, ...]] = (True, True, False, False, True, True)

    @classmethod
    def fit(
        cls,
        pool: np.ndarray,
        query: np.ndarray,
        losses: np.ndarray,
        wanted: np.ndarray,
        *,
        copies: np.ndarray | None = None,
    ) -> tuple[TextTerms, np.ndarray, np.ndarray]:
        """As :meth:`LabelTerms.fit`, of features (N, L, 2, d) and losses (N,)."""
        own = sides(copies, len(pool))
        likeness, pool_text, query_text = Likeness.fit(pool, query, copies=own[1])
        values = _pairs(likeness, query, wanted)
        terms = cls(likeness, values.mean(0))
        off = -np.square((values - terms.usual) * len(query) / (len(query) - 1))
        return (
            terms,
            np.column_stack([pool_text, terms._rest(pool, losses)]),
            np.column_stack([query_text, values, off]),
        )

    def values(self, features: np.ndarray, last: np.ndarray) -> np.ndarray:
        """See :class:`Terms`."""
        return np.column_stack([self.likeness.cosines(features), self._rest(features, last)])

    def _rest(self, features: np.ndarray, losses: np.ndarray) -> np.ndarray:
        values = _pairs(self.likeness, features, losses)
        return np.column_stack([values, -np.square(values - self.usual)])


def _pairs(likeness: Likeness, features: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(n, 2): cosine of source and target, mean over the layers, and the loss."""
    unit = _unit(likeness.standardised(features))
    return np.column_stack([(unit[:, :, 0] * unit[:, :, 1]).sum(-1).mean(1), losses])


def fit_terms(
    shape: Shape, pool: np.ndarray, query: np.ndarray, *, copies: np.ndarray | None = None, seed: int, classes: int = 0
) -> tuple[Terms, np.ndarray, np.ndarray]:
    """The terms that suit the task; and their values for the pool's rows (N, m) and the query's (n, m).

    Args:
        pool, query: numbers of the rows, as :class:`.FeatureLook` gives them.
        copies: numbers of groups of rows that are the same but for their answers, of the pool's and then the query's,
            (N + n,): what has seen a row's copy has seen the row. None: all differ.
        classes: see :meth:`LabelTerms.fit`.
    """
    (features, last), (wanted, answers) = shape.split(pool), shape.split(query)
    if shape.kind == "classes":
        return LabelTerms.fit(
            features, wanted, last.astype(np.int64), answers.astype(np.int64), copies=copies, seed=seed, classes=classes
        )
    if shape.kind == "number":
        return NumberTerms.fit(features, wanted, last.astype(np.float64), answers.astype(np.float64), copies=copies)
    return TextTerms.fit(features, wanted, last, answers, copies=copies)
