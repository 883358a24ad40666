"""Steps whose loss or gradient is not finite: left out, counted, and named by their samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.step import StepResult

log = logging.getLogger("tsqlora_scale")


@dataclass
class NonFiniteSteps:
    """How many steps of a run failed, and what is said of each. The same on every rank.

    Attributes:
        limit: ``train.max_nonfinite``.
        count: such steps so far.
    """

    limit: int
    count: int = 0

    def add(self, result: StepResult, ids: Sequence[str], culprits: Sequence[str]) -> dict[str, Any]:
        """Count a failed step; what its line of ``metrics.jsonl`` has in the place of a loss.

        Args:
            result: of the step.
            ids: of its samples, (batch_size,), in the order of the draw.
            culprits: ids of those whose own loss is not finite.
        """
        self.count += 1
        return {
            "nonfinite": {
                "loss": str(result.loss),  # JSON has no such numbers
                "grad_norm": str(result.grad_norm),
                "count": self.count,
                "sample_ids": list(ids),
                "culprits": list(culprits),
            }
        }

    def report(self, step: int, line: dict[str, Any], *, warns: bool) -> None:
        """Say what :meth:`add` has returned for ``step``.

        Args:
            warns: whether this process prints.

        Raises:
            UserError: on every rank, when there have been more than ``limit``.
        """
        outcome = line["nonfinite"]
        culprits = f" (not finite: {', '.join(outcome['culprits'])})" if outcome["culprits"] else ""
        message = (
            f"step {step} has a loss of {outcome['loss']} and a gradient of norm {outcome['grad_norm']}, "
            f"on the samples {', '.join(outcome['sample_ids'])}{culprits}"
        )
        if self.count > self.limit:
            raise UserError(
                f"train.max_nonfinite={self.limit}, and {message}, {'first' if self.count == 1 else f'{self.count}th'} "
                "such step; look at these samples, lower train.lr, or continue from an earlier checkpoint"
            )
        if warns:
            log.warning("%s: left out, number %d of at most %d such steps", message, self.count, self.limit)
