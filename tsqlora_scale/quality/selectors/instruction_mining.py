"""``sampling.selector: instruction_mining``: a linear rule from indicators of a sample to what it is worth.

Cao et al., *Instruction Mining: Instruction Data Selection for Tuning Large Language Models*, 2307.06290: models are
tuned on many subsets, and the logarithm of their loss on rows set apart is regressed on the subsets' mean indicators;
samples are then rated by that line. As there, with what needs other models left out (a reward model, UniEval's
naturalness, coherence and understandability): length, lexical diversity (MTLD), distance to the sixth neighbour in the
pool, and the loss. In the place of tuned models stand linear ones on the frozen base's features, so that the line is
fitted to the pool at hand; subsets are drawn with a leaning to some mixture of the indicators, as theirs are mixed of
data of different worth.

Judged on the query's rows where there is a query, else on a random part of the pool, which is rated like the rest.
"""

from __future__ import annotations

import re

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.random_streams import gumbel, philox
from tsqlora_scale.quality.features.unit_features import unit_features
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.selectors.forward_selector import ForwardSelector
from tsqlora_scale.quality.selectors.ranked import Rating
from tsqlora_scale.quality.selectors.ts_dshapley import valuing_rows

INDICATORS = ("length", "diversity", "sixth_neighbour", "loss")
#: Subsets, samples of each at most, rows that judge at most, rows of the pool among which neighbours are looked for.
SUBSETS, LARGEST, JUDGING, NEAR = 100, 400, 500, 4000
#: Ridge of the linear models and of the line, beside mean squared errors; share of different words that MTLD waits for.
RIDGE, LINE_RIDGE, TYPES = 1e-2, 1e-2, 0.72
_WORDS = re.compile(r"\w+")


class InstructionMiningSelector(ForwardSelector):
    """Keeps the samples whose indicators go with low losses of what is learned from them."""

    def rate(self, module: nn.Module) -> Rating:
        """One forward pass over pool and query, and one look at the texts."""
        numbers, wanted, shape = self.features(module)
        ratings, indicators, line = self.context.world.from_main(lambda: self._rated(numbers, wanted, shape))
        terms = {f"mined_{name}": indicators[:, place] for place, name in enumerate(INDICATORS)}
        findings = {"line": dict(zip(INDICATORS, np.round(line, 4).tolist(), strict=True))}
        return Rating(ratings, terms=terms, findings=findings)

    def _rated(
        self, numbers: np.ndarray, wanted: np.ndarray, shape: Shape
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed, choices = self.config.run.seed, self.choices
        features, last = unit_features(numbers, shape, pool=numbers[:choices])
        of_judging, of_last = unit_features(wanted, shape, pool=numbers[:choices])
        classes = int(max(last.max(), of_last.max(initial=0))) + 1 if shape.kind == "classes" else 0
        answers, right = _answers(features, last, classes), _answers(of_judging, of_last, classes)
        among = np.arange(choices)
        if not len(wanted):
            judging = valuing_rows(choices, JUDGING, seed=seed)
            of_judging, right = features[judging], answers[judging]
            among = np.setdiff1d(among, judging) if choices > 1 else among
        losses = last if shape.kind == "text" else out_of_sample(features[:, 0], answers, seed=seed)
        indicators = np.column_stack([*self._of_texts(shape), sixth_distances(features[:, 0], seed=seed), losses])
        standardised = _standardised(indicators, indicators[:choices])
        means, log_losses = [], []
        for rows in leaning_subsets(standardised[among], min(LARGEST, max(len(among) // 4, 1)), seed=seed):
            chosen = among[rows]
            predicted = ridge_answers(features[chosen, 0], answers[chosen], of_judging[:, 0])
            means.append(standardised[chosen].mean(0))
            log_losses.append(np.log(np.square(predicted - right).mean() + 1e-12))
        line = fitted_line(np.array(means), np.array(log_losses))
        return -standardised @ line, indicators, line

    def _of_texts(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Words and lexical diversity of every answer that is a text, else of what is answered: (N,) each."""
        lengths, diversities = np.empty(len(self.pool)), np.empty(len(self.pool))
        for block in blocks(len(self.pool), 2**14):
            texts = self.pool.texts(np.arange(block.start, block.stop))
            words = [_WORDS.findall((row[-1] if shape.kind == "text" else " ".join(row)).lower()) for row in texts]
            lengths[block] = [np.log1p(len(found)) for found in words]
            diversities[block] = [lexical_diversity(found) for found in words]
        return lengths, diversities


def lexical_diversity(words: list[str]) -> float:
    """MTLD (McCarthy and Jarvis 2010): the mean length of stretches whose share of different words stays above 0.72,
    read from the front and from the back; the number of words where they are all different."""
    return (_stretches(words) + _stretches(words[::-1])) / 2


def _stretches(words: list[str]) -> float:
    factors, seen, count = 0.0, set[str](), 0
    for word in words:
        seen.add(word)
        count += 1
        if len(seen) / count <= TYPES:
            factors, seen, count = factors + 1, set(), 0
    if count:
        factors += (1 - len(seen) / count) / (1 - TYPES)
    return len(words) / factors if factors > 0 else float(len(words))


def sixth_distances(features: np.ndarray, *, seed: int) -> np.ndarray:
    """Distance (N,) of every row to its sixth nearest, itself not counted; of a large pool among a random part."""
    near = philox(seed, "mining neighbours").permutation(len(features))[:NEAR]
    squares = np.square(features.astype(np.float64)).sum(1)
    found = np.empty(len(features))
    for block in blocks(len(features), 2**10):
        rows = np.arange(block.start, block.stop)
        distances = squares[rows, None] + squares[near] - 2 * (features[block] @ features[near].T)
        distances[rows[:, None] == near] = np.inf
        place = min(5, max(len(near) - 2, 0))
        found[block] = np.sqrt(np.maximum(np.partition(distances, place, axis=1)[:, place], 0))
    return np.where(np.isfinite(found), found, 0.0)


def out_of_sample(features: np.ndarray, answers: np.ndarray, *, seed: int) -> np.ndarray:
    """Squared errors (N,) of linear models fitted to other rows: two random parts, each by a model of the other."""
    halves = philox(seed, "mining halves").permutation(len(features)) % 2
    errors = np.empty(len(features))
    for half in (0, 1):
        fitted = np.flatnonzero(halves != half)[:NEAR]
        for block in blocks(len(features), 2**14):
            rows = block.start + np.flatnonzero(halves[block] == half)
            predicted = ridge_answers(features[fitted], answers[fitted], features[rows])
            errors[rows] = np.square(predicted - answers[rows]).mean(1)
    return errors


def ridge_answers(features: np.ndarray, answers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Answers (m, C) of a linear model, fitted to ``features`` (n, d) and ``answers`` (n, C), at ``rows`` (m, d)."""
    if not len(features):
        return np.zeros((len(rows), answers.shape[1]))
    x, level = features.astype(np.float64), answers.mean(0)
    gram = x @ x.T + RIDGE * len(x) * np.eye(len(x))
    predicted: np.ndarray = rows.astype(np.float64) @ (x.T @ np.linalg.solve(gram, answers - level)) + level
    return predicted


def leaning_subsets(indicators: np.ndarray, size: int, *, seed: int) -> list[np.ndarray]:
    """:data:`SUBSETS` draws of ``size`` rows without replacement, each by a random mixture of indicators (n, m)."""
    subsets = []
    for number in range(SUBSETS):
        generator = philox(seed, "mining subsets", number)
        leaning = indicators @ generator.standard_normal(indicators.shape[1])
        keys = leaning + gumbel(generator, len(indicators))
        subsets.append(np.sort(np.argsort(-keys, kind="stable")[:size]))
    return subsets


def fitted_line(means: np.ndarray, log_losses: np.ndarray) -> np.ndarray:
    """Slopes (m,) of log losses (n,) over mean indicators (n, m), by least squares with a little ridge."""
    x, y = means - means.mean(0), log_losses - log_losses.mean()
    line: np.ndarray = np.linalg.solve(x.T @ x + LINE_RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return line


def _standardised(values: np.ndarray, pool: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = np.clip((values - pool.mean(0)) / (pool.std(0) + 1e-12), -3, 3)
    return scaled


def _answers(features: np.ndarray, last: np.ndarray, classes: int) -> np.ndarray:
    """(n, C): classes one-hot, the features of the answer's text where there are two regions, or a number."""
    if classes:
        return np.eye(classes)[last.astype(np.int64)]
    return features[:, 1] if features.shape[1] == 2 else last[:, None]
