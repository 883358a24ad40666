"""What an audit has found of every sample of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsqlora_scale.audit.share_belief import ShareBelief

#: nats a sample below which the sources hardly tell labels at all
WEAK_GAIN = 0.02
#: the share of a number's variance below which the same is said
WEAK_EXPLAINED = 0.05
#: suggested fixes are those that are more probable than not
LIKELY = 0.5
#: off the query are those that surely are: the share of wanted rows is a rough estimate, and rather too low
FAR = 0.9


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One entry a sample, in the pool's order, without rows of the query. On rank 0.

    Attributes:
        kind: ``task.type``.
        ids: names of the samples, and, behind them, of the query's.
        labels: class ids (n,), or numbers; None where the answers are texts.
        names: of the classes.
        suspicion: by which samples are ordered, (n,), larger is more suspect.
        wrong: probability that the label is wrong, (n,); None where it cannot be told.
        suggested: the likeliest other class (n,), or the predicted number; None where there is none.
        first: the first sample of each one's group of copies and near-copies, (n,).
        same: the first sample with the same text, (n,), and the same answer where that is a text.
        share: of wrong labels; None where it cannot be told.
        flows: expected samples that have class k and are of class c, (C, C); None without classes.
        strength: how well the sources tell labels, and whether that is weak.
        sources: what the samples were judged by, and the weight of each.
        off_query: probability that a sample is none of what ``task.query`` wants, (n,); None where that is not known.
        seconds: by phase.
    """

    kind: str
    ids: Sequence[str]
    labels: np.ndarray | None
    names: list[str] | None
    suspicion: np.ndarray
    wrong: np.ndarray | None
    suggested: np.ndarray | None
    first: np.ndarray
    same: np.ndarray
    share: ShareBelief | None
    flows: np.ndarray | None
    strength: dict[str, float | bool]
    sources: dict[str, float]
    off_query: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.suspicion)

    def order(self) -> np.ndarray:
        """Places of the samples, the most suspect first, (n,)."""
        return np.argsort(-self.suspicion, kind="stable")

    def ranks(self) -> np.ndarray:
        """The place of every sample among those of its own label, from 1, (n,): 1 is the most suspect."""
        strata = self.labels if self.names is not None and self.labels is not None else np.zeros(len(self), np.int64)
        order = np.lexsort((-self.suspicion, strata))
        starts = np.searchsorted(strata[order], strata[order])
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[order] = np.arange(len(self)) - starts + 1
        return ranks

    def label(self, place: int) -> str:
        """A sample's label as the data has it."""
        return "" if self.labels is None else self.label_text(self.labels[place])

    def suggestion(self, place: int) -> str:
        """The label that a sample probably should have; nothing where none is known."""
        return "" if self.suggested is None else self.label_text(self.suggested[place])

    def label_text(self, value: float) -> str:
        """A class by its name, a number as it is written."""
        return self.names[int(value)] if self.names is not None else f"{float(value):.6g}"

    def fixes(self) -> list[tuple[int, str]]:
        """Samples to look at or leave out, and why, the most suspect first.

        Labels that are more probably wrong than right; copies to the letter of another sample, all but the least
        suspect of them; and samples that are off the query with a probability of :data:`FAR`.
        """
        reasons: dict[int, str] = {}
        for members in groups_of(self.same):
            kept = int(members[np.argmin(self.suspicion[members])])
            for member in members.tolist():
                if member != kept:
                    other = self.labels is not None and self.labels[member] != self.labels[kept]
                    reasons[member] = f"copy of {self.ids[kept]}" + (" with another label" if other else "")
        if self.wrong is not None:
            for place in np.flatnonzero(self.wrong >= LIKELY).tolist():
                copied = f"; {reasons[place]}" if place in reasons else ""
                reasons[place] = f"label is probably wrong{copied}"
        for place in self.strangers().tolist():
            before = f"{reasons[place]}; " if place in reasons else ""
            reasons[place] = f"{before}off the query"
        return sorted(reasons.items(), key=lambda fix: (-self.suspicion[fix[0]], fix[0]))

    def strangers(self) -> np.ndarray:
        """Places of the samples that are off the query with a probability of :data:`FAR`, the surest first."""
        if self.off_query is None:
            return np.empty(0, dtype=np.int64)
        order = np.argsort(-self.off_query, kind="stable")
        return order[self.off_query[order] >= FAR]

    def copies(self) -> list[np.ndarray]:
        """Places of the samples of every group of copies and near-copies, large groups first."""
        return groups_of(self.first)

    def classes(self) -> list[dict[str, Any]]:
        """By label: samples, how many are expected to be wrong, and what they most often are instead."""
        if self.names is None or self.labels is None or self.wrong is None or self.flows is None:
            return []
        found = []
        for number, name in enumerate(self.names):
            inside = self.labels == number
            if not inside.any():
                continue
            flows = self.flows[number].copy()
            flows[number] = -1.0
            found.append(
                {
                    "label": name,
                    "samples": int(inside.sum()),
                    "expected wrong": round(float(self.wrong[inside].sum()), 1),
                    "share": round(float(self.wrong[inside].mean()), 4),
                    "listed": int((self.wrong[inside] >= LIKELY).sum()),
                    "most often": self.names[int(flows.argmax())],
                }
            )
        return found

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        groups = self.copies()
        low, high = (None, None) if self.share is None else self.share.interval()
        return {
            "samples": len(self),
            "task": self.kind,
            "share of wrong labels": None if self.share is None else round(self.share.share, 4),
            "between": None if low is None or high is None else [round(low, 4), round(high, 4)],
            "with probability": 0.9,
            "fixes": len(self.fixes()),
            "copies": int(sum(len(group) - 1 for group in groups)),
            "groups of copies": len(groups),
            "off the query": None if self.off_query is None else len(self.strangers()),
            "classes": self.classes(),
            "strength": self.strength,
            "sources": {name: round(weight, 4) for name, weight in self.sources.items()},
            "seconds": {name: round(value, 3) for name, value in sorted(self.seconds.items())},
        }


def groups_of(first: np.ndarray) -> list[np.ndarray]:
    """Places of the samples of every group of several, large groups first.

    Args:
        first: the first sample of each one's group, (n,).
    """
    order = np.argsort(first, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(first[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))
