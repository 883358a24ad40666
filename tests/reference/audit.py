"""The audit's formulas, slow and plain."""

from __future__ import annotations

import math

import numpy as np


def ridge_without(features: np.ndarray, targets: np.ndarray, groups: np.ndarray, penalty: float) -> np.ndarray:
    """Predictions (n, C) by one regression for every sample, on all samples of other groups; features as they are."""
    found = np.zeros(targets.shape)
    size, width = features.shape
    for i in range(size):
        others = groups != groups[i]
        design = np.column_stack([features[others], np.ones(others.sum())])
        ridge = np.diag([penalty * size] * width + [0.0])
        weights = np.linalg.solve(design.T @ design + ridge, design.T @ targets[others])
        found[i] = np.append(features[i], 1.0) @ weights
    return found


def wrong_label(right: list[float], label: int, rate: float) -> float:
    """P(the right class is another | text, label) by Bayes' rule, class by class."""
    joint = []
    for c, q in enumerate(right):
        chance = 1 - rate if c == label else rate / (len(right) - 1)
        joint.append(q * chance)
    return 1 - joint[label] / math.fsum(joint)
