"""Other rules for ranks than the package's own, to be run through the loop."""

from __future__ import annotations

from tsqlora_scale.ranks import Plan, Statistics


class RemoveAndRestore:
    """Every third layer loses its adapter at one event and gets it back at the next; the others grow and shrink."""

    def plan(self, stats: Statistics) -> Plan:
        """From the present ranks alone."""
        removed = 0 in stats.ranks.values()
        choices = (stats.initial_rank, stats.initial_rank + 2, 2) if removed else (0, 3, stats.initial_rank + 1)
        ranks = {name: choices[i % 3] for i, name in enumerate(stats.ranks)}
        return Plan(ranks=ranks, phi=1.0, budget=sum(ranks.values()), sensitivity=stats.sensitivity, reasons={})
