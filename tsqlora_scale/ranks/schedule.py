"""When ranks change: warm up, adjust, stabilise."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.fields import as_steps
from tsqlora_scale.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps after which ranks change.

    ``events`` holds counts of finished steps, ascending, each in [1, total_steps - 1]: nothing would be
    trained after an event that follows the last step.
    """

    events: tuple[int, ...]

    @classmethod
    def from_config(cls, cfg: ScheduleConfig, total_steps: int) -> Schedule:
        """Events at ``start``, ``start + every``, … up to and including ``end``.

        Raises:
            UserError: when no event falls inside the run.
        """
        start, end = as_steps(cfg.start, total_steps), as_steps(cfg.end, total_steps)
        every = as_steps(cfg.every, total_steps)
        events = tuple(step for step in range(start, min(end, total_steps - 1) + 1, every) if step >= 1)
        if not events:
            raise UserError(
                f"schedule.start={cfg.start}, schedule.end={cfg.end}, schedule.every={cfg.every} (steps {start} to "
                f"{end}, every {every}) put no event inside the run of {total_steps} optimizer steps: an event needs "
                f"start <= end and falls after steps 1 to {total_steps - 1}; change the schedule, train longer, or "
                "set allocation.policy=fixed to keep ranks (and scoring.refresh=none to keep scores)"
            )
        return cls(events)

    def progress(self, step: int) -> float:
        """How far between the first event (0) and the last (1) the run is after ``step`` steps; 1 if there is one."""
        first, last = self.events[0], self.events[-1]
        return (step - first) / (last - first) if last > first else 1.0

    def due(self, step: int) -> bool:
        """Whether ranks change once ``step`` optimizer steps are finished."""
        return step in self.events


def leads_up(step: int, events: Sequence[int], *, every: int, window: int | None) -> bool:
    """Whether the step that follows ``step`` finished ones is listened to: every ``every``-th, counted back from the
    next of ``events``, as far as ``window``."""
    following = bisect_right(events, step)
    if following == len(events):
        return False
    ahead = events[following] - 1 - step
    return ahead % every == 0 and (window is None or ahead < window)
