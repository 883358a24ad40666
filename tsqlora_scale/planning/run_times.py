"""Time of a run by phase, as multiples of an optimizer step: by the operations of each."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tsqlora_scale.config.quality_sections import MODEL_FREE_SELECTORS
from tsqlora_scale.config.rank_sections import COMPONENT_POLICIES
from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.dataless_task import DatalessTask
from tsqlora_scale.planning.phantom import Phantom
from tsqlora_scale.planning.phantom_passes import PassNeeds
from tsqlora_scale.quality.draws.subset import share_of
from tsqlora_scale.quality.selectors.by_quality import refresh_steps
from tsqlora_scale.run.plan import RunPlan

#: Steps that an event is allowed to take: gathering, resizing and preparing the engine again are no operations of the
#: model, and take under a second for most.
EVENT = 1.0


@dataclass(frozen=True)
class RunTimes:
    """A run's phases.

    Attributes:
        steps: each phase in optimizer steps.
        tokens_per_step: that a step reads at most, padding counted, over all devices.
        flops_per_step: of all devices.
    """

    steps: dict[str, float]
    tokens_per_step: int
    flops_per_step: int

    def hours(self, tokens_per_second: float) -> dict[str, float]:
        """Each phase, by the tokens that all devices train on in a second."""
        step = self.tokens_per_step / tokens_per_second / 3600
        return {phase: count * step for phase, count in self.steps.items()}


def run_times(
    config: Config,
    plan: RunPlan,
    phantom: Phantom,
    *,
    step: PassNeeds,
    scoring: tuple[PassNeeds, int],
    evaluation: PassNeeds,
    dev_size: int,
) -> RunTimes:
    """Phases of a run.

    Args:
        step: a micro-batch's needs.
        scoring: a scoring batch's, and its samples.
        evaluation: an evaluation batch's.
        dev_size: held-out rows.
    """
    micro_batches = config.train.batch_size / plan.micro_batch_size
    of_step = max(step.flops * micro_batches, 1.0)
    needs, rows = scoring
    per_row = needs.flops / max(rows, 1)
    held_out = evaluation.flops * dev_size / config.train.eval_batch_size
    events = len(plan.schedule.events) if plan.schedule is not None and config.adapts_ranks else 0
    task = DatalessTask(config.task)
    steps = {
        "steps": float(plan.total_steps),
        "listening to sensitivities": _listened(config, plan, phantom) / of_step,
        "scoring": per_row * scored_samples(config, plan) / of_step,
        "evaluation": config.train.evaluations(plan.total_steps) * held_out / of_step,
        "events": events * EVENT,
    }
    return RunTimes(steps, config.train.batch_size * (task.longest + task.decoder), int(of_step))


def scored_samples(config: Config, plan: RunPlan) -> int:
    """Samples that all looks at the pool take together."""
    without = config.sampling.selector in MODEL_FREE_SELECTORS
    elsewhere = config.scores_online or config.scores_by_proxy or without
    if not config.looks_at_pool or elsewhere:
        return 0
    scoring = config.scoring
    first = min(plan.pool_size, scoring.max_samples or plan.pool_size) if config.scores_data else plan.pool_size
    if not config.refreshes_scores or plan.schedule is None:
        return first
    later = [event for event in refresh_steps(scoring, plan.schedule.events) if event > (plan.scoring_step or 0)]
    return first + len(later) * share_of(scoring.refresh_fraction, plan.subset_size)


def _listened(config: Config, plan: RunPlan, phantom: Phantom) -> float:
    """Operations of forming the weights' gradients in the steps that are listened to."""
    chosen = config.allocation.policy in COMPONENT_POLICIES and config.resize.grow_init != "gradient"
    if not config.adapts_ranks or plan.schedule is None or config.sensitivity.estimator == "adapter" or chosen:
        return 0.0
    settings, last, steps = config.sensitivity, 0, 0
    for event in plan.schedule.events:
        steps += min(event - last, settings.window or event - last) // settings.every
        last = event
    weights = sum(prod(p.shape) for n, p in phantom.model.named_parameters() if n.endswith(".base_layer.weight"))
    samples = min(config.train.batch_size, settings.max_samples or config.train.batch_size)
    return float(2 * steps * samples * config.task.max_length * weights)
