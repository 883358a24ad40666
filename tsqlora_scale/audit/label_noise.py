"""How probably a label is wrong, given what models that have not seen the sample say of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.audit.share_belief import ShareBelief, believed
from tsqlora_scale.common.random_streams import philox

#: shares of wrong labels that are weighed, as a part of what labels drawn blindly would give
GRID = (*np.linspace(0.0, 0.3, 24, endpoint=False), *np.linspace(0.3, 0.9, 21))
#: samples that the few numbers of the model are fitted on
FIT_SAMPLES = 20_000
#: scores of a class are penalised as if so many samples had been seen
PENALTY = 0.02
ITERATIONS = 60


@dataclass(frozen=True)
class LabelNoise:
    """What is believed of the labels of a pool.

    Attributes:
        given: calibrated out-of-sample probability of the label that each sample has, (n,).
        wrong: probability that this label is not the right one, (n,).
        classes: probabilities of the right class given text and label, (n, C).
        share: of wrong labels.
        weights: of the sources, (S,); 0: it says nothing more.
        gain: nats a sample by which the sources tell labels better than the classes' shares do.
    """

    given: np.ndarray
    wrong: np.ndarray
    classes: np.ndarray
    share: ShareBelief
    weights: np.ndarray
    gain: float


def judge_labels(scores: np.ndarray, labels: np.ndarray, *, seed: int) -> LabelNoise:
    """The noise model: right classes by the sources, labels by a flip rate, which is not known but weighed.

    ``q_i = softmax(sum_s w_s z_si + b)`` with ``w_s >= 0`` is the right class of sample i, and a label is the right
    class with probability ``1 - r``, else any other. For every rate r of a grid, w and b are those of the largest
    likelihood of the labels; the rates' likelihoods times an exponential prior say how far each is believed. So a pool
    whose texts do not tell noise from difficulty gets a wide interval, not a wrong number: measured on flipped SST-2,
    rates estimated alone, or one for every class, ranked worse and were off by up to 35 points.

    The probability that a label is wrong falls with the calibrated probability of that label, so both give one order.

    Args:
        scores: out of sample, (S, n, C): of source s for each class, larger is likelier; of any scale.
        labels: class ids (n,).
        seed: of the run; of large pools a random part is fitted on.
    """
    sources, size, classes = scores.shape
    scaled = torch.from_numpy(scores).double()
    scaled = scaled - scaled.mean(2, keepdim=True)
    scaled = scaled / scaled.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    ids = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    part = torch.arange(size)
    if size > FIT_SAMPLES:
        part = torch.from_numpy(np.sort(philox(seed, "noise model").permutation(size)[:FIT_SAMPLES]))
    rates = np.array(GRID) * (classes - 1) / classes
    evidence, parameters = np.zeros(len(rates)), []
    start = torch.cat([torch.full((sources,), 1.0 / sources), torch.zeros(classes)]).double()
    for number, rate in enumerate(rates):
        start, likelihood = fit(scaled[:, part], ids[part], float(rate), start)
        parameters.append(start)
        evidence[number] = likelihood  # of the part: what was not fitted on says nothing of the rate
    return _averaged(scaled, ids, rates, believed(evidence, rates), parameters)


def fit(scores: Tensor, labels: Tensor, rate: float, start: Tensor) -> tuple[Tensor, float]:
    """Weights and offsets (S + C,) of the largest penalised likelihood under a flip rate, and its logarithm."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    sources, size = len(scores), len(labels)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -log_labels(scores, labels, rate, parameters).mean()
        value = value + PENALTY / size * parameters.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    found = parameters.detach()
    found = torch.cat([found[:sources].abs(), found[sources:]])
    penalty = PENALTY * float(found.square().sum()) / 2
    return found, float(log_labels(scores, labels, rate, found).sum()) - penalty


def right_classes(scores: Tensor, parameters: Tensor) -> Tensor:
    """log q, (n, C)."""
    sources = len(scores)
    mixed = (parameters[:sources].abs()[:, None, None] * scores).sum(0) + parameters[sources:]
    return mixed.log_softmax(-1)


def log_labels(scores: Tensor, labels: Tensor, rate: float, parameters: Tensor) -> Tensor:
    """Log-probabilities (n,) of the labels under a flip rate."""
    right = right_classes(scores, parameters).gather(1, labels[:, None]).squeeze(1)
    if rate == 0:
        return right
    others = scores.shape[2] - 1
    return ((1 - rate) * right.exp() + rate / others * (1 - right.exp())).log()


def _averaged(
    scores: Tensor, labels: Tensor, rates: np.ndarray, belief: np.ndarray, parameters: list[Tensor]
) -> LabelNoise:
    """Averages over the rates."""
    size, classes = scores.shape[1:]
    given, wrong = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    found = torch.zeros(size, classes, dtype=torch.float64)
    shares = np.zeros(len(rates))
    for number, (rate, weight) in enumerate(zip(rates, belief, strict=True)):
        q = right_classes(scores, parameters[number]).exp()
        posterior = q * (rate / (classes - 1))
        kept = (1 - rate) * q.gather(1, labels[:, None])
        posterior.scatter_(1, labels[:, None], kept)
        of_label = posterior.sum(1)
        posterior = posterior / of_label[:, None]
        mistaken = 1 - kept.squeeze(1) / of_label
        shares[number] = float(mistaken.mean())
        given += weight * of_label
        wrong += weight * mistaken
        found += weight * posterior
    of_class = torch.bincount(labels, minlength=classes).double() / size
    blind = -float((of_class[of_class > 0] * of_class[of_class > 0].log()).sum())
    best = parameters[int(belief.argmax())]
    return LabelNoise(
        given=given.numpy(),
        wrong=wrong.clamp(0, 1).numpy(),
        classes=found.numpy(),
        share=ShareBelief(rates, belief, shares),
        weights=best[: len(scores)].numpy(),
        gain=blind + float(given.log().mean()),
    )
