"""Features of rows whose wanted part is known."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.quality.query.looks import Shape

LAYERS, WIDTH = 2, 24


class Made:
    """Rows of two topics, and their answers by a rule of each topic: class, number, or a target near the source."""

    def __init__(self, kind: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind, self.regions = kind, 2 if kind == "text" else 1
        self.topics = self.rng.normal(0, 0.7, (2, LAYERS, self.regions, WIDTH))
        self.rules = self.rng.normal(0, 1, (2, WIDTH)) / np.sqrt(WIDTH)
        self.shape = Shape(LAYERS, self.regions, WIDTH, kind)

    def rows(self, topic: np.ndarray, rule: np.ndarray) -> np.ndarray:
        """Numbers (n, L R d + 1) of rows on a topic each, labelled by a rule each; of no effect on texts' topics."""
        n = len(topic)
        features = self.topics[topic] + self.rng.normal(0, 1, (n, LAYERS, self.regions, WIDTH))
        features[:, 1] += features[:, 0]
        said = (features[:, 0, 0] * self.rules[rule]).sum(-1)
        if self.kind == "classes":
            last = (said + 0.2 * self.rng.normal(size=n) > 0).astype(float)
        elif self.kind == "number":
            last = said + 0.2 * self.rng.normal(size=n)
        else:
            last = 2 + 0.3 * rule + 0.3 * self.rng.normal(size=n)
        return np.column_stack([features.reshape(n, -1), last]).astype(np.float32)

    def agreement(self, rows: np.ndarray, rule: int) -> np.ndarray:
        """Whether a rule predicts the class, or the sign of the number, of rows (n, L R d + 1): (n,) bool."""
        features = rows[:, :-1].reshape(len(rows), LAYERS, self.regions, WIDTH)
        told = features[:, 0, 0] @ self.rules[rule] > 0
        agrees: np.ndarray = told == (rows[:, -1] > (0.5 if self.kind == "classes" else 0.0))
        return agrees


def zeros(n: int) -> np.ndarray:
    return np.zeros(n, dtype=np.int64)
