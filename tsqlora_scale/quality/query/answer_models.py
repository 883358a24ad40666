"""How likely an answer is by a linear head on frozen features: a class, or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.quality.query.feature_heads import Heads, fit_heads
from tsqlora_scale.quality.query.fits import log_linear


class AnswerModel(Protocol):
    """``log p(y|x)``."""

    def log_likelihood(self, features: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Of rows that the model has not seen, (n,), from features (n, L, d) and answers (n,)."""
        ...


@dataclass(frozen=True)
class ClassModel:
    """A head of least squares on one-hot classes, its scores calibrated on rows left out."""

    heads: Heads
    scale: float
    calibration: tuple[Tensor, Tensor]

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        answers: np.ndarray,
        weights: np.ndarray,
        *,
        judged: np.ndarray | None,
        copies: np.ndarray | None = None,
        classes: int,
    ) -> tuple[ClassModel, np.ndarray]:
        """The model; and the log-likelihoods of its rows (n,), each by heads that have not seen it.

        Args:
            features: (n, L, d) float64.
            answers: class ids (n,) int64.
            weights: of the rows, (n,), above 0.
            judged, copies: see :func:`fit_heads`.
        """
        heads, held_out = fit_heads(features, np.eye(classes)[answers], weights=weights, judged=judged, copies=copies)
        scale = float(held_out.std()) + 1e-9
        y, part = torch.from_numpy(answers), torch.from_numpy(weights / weights.sum())
        scores = torch.from_numpy(held_out / scale)[:, :, None]
        model = cls(heads, scale, log_linear(scores, y, 1 / len(y), weights=part, left_out=True))
        return model, model._judged(held_out, answers)

    def log_likelihood(self, features: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """See :class:`AnswerModel`."""
        return self._judged(self.heads.scores(features), answers.astype(np.int64))

    def _judged(self, scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
        factors, biases = self.calibration
        logits = torch.from_numpy(scores / self.scale)[:, :, None] @ factors + biases
        found: np.ndarray = logits.log_softmax(1).numpy()[np.arange(len(answers)), answers]
        return found


@dataclass(frozen=True)
class NumberModel:
    """A head of least squares, and a normal density about it."""

    heads: Heads
    deviation: float

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        answers: np.ndarray,
        weights: np.ndarray,
        *,
        judged: np.ndarray | None,
        copies: np.ndarray | None = None,
    ) -> tuple[NumberModel, np.ndarray]:
        """As :meth:`ClassModel.fit`, of numbers (n,) float64."""
        heads, held_out = fit_heads(features, answers[:, None], weights=weights, judged=judged, copies=copies)
        errors = answers - held_out[:, 0]
        deviation = float(np.sqrt(weights @ np.square(errors) / weights.sum())) + 1e-9
        return cls(heads, deviation), normal_density(errors, deviation)

    def log_likelihood(self, features: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """See :class:`AnswerModel`."""
        return normal_density(answers - self.heads.scores(features)[:, 0], self.deviation)


def fit_answers(
    features: np.ndarray,
    answers: np.ndarray,
    weights: np.ndarray,
    *,
    judged: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    classes: int | None,
) -> tuple[AnswerModel, np.ndarray]:
    """A model of ``answers`` (n,), and their log-likelihoods left out (n,); ``classes`` is None for numbers."""
    if classes is None:
        return NumberModel.fit(features, answers, weights, judged=judged, copies=copies)
    return ClassModel.fit(features, answers, weights, judged=judged, copies=copies, classes=classes)


def normal_density(errors: np.ndarray, deviation: float) -> np.ndarray:
    """Its logarithm (n,) up to a constant, of errors (n,)."""
    density: np.ndarray = -0.5 * np.square(errors / deviation) - np.log(deviation)
    return density
