"""What a rank receives of others in a run, by phase, under every engine."""

from __future__ import annotations

from math import ceil

from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.held_bytes import WHOLE, HeldWeights
from tsqlora_scale.planning.phantom_passes import Look
from tsqlora_scale.planning.run_times import scored_samples
from tsqlora_scale.run.plan import RunPlan
from tsqlora_scale.tasks.metrics import needs_answers, needs_losses

#: Passes of a scoring batch that a base is gathered for.
PASSES: dict[Look, int] = {"none": 0, "forward": 1, "gradients": 2, "exact": 3}


def received_bytes(
    engine: str, config: Config, plan: RunPlan, weights: HeldWeights, *, look: Look, scoring_rows: int, dev_size: int
) -> dict[str, int]:
    """Bytes of a whole run that one rank receives, by the phases of :class:`.RunTimes`.

    Gradients and stepped factors are exchanged once a step by all engines alike. ZeRO-3 and FSDP2 gather the base for
    every forward and every backward pass, once more where activations are computed again, and for every token that is
    generated.

    Args:
        look: how a scoring batch looks at samples.
        scoring_rows: of it.
        dev_size: held-out rows.
    """
    ranks = plan.world_size
    of_others = (ranks - 1) / ranks
    base = sum(weight.whole - _held(engine, weights, at, ranks) for at, weight in enumerate(weights.frozen))
    if engine == "zero3":  # shares what trains like all else, where it is large
        base += sum(int(4 * size * of_others) for size in weights.trained if size > WHOLE)
    gathers = 3 if config.model.gradient_checkpointing else 2
    adapter = int(2 * of_others * 4 * weights.trained_elements)
    scored = ceil(scored_samples(config, plan) / max(scoring_rows * ranks, 1))
    judged = ceil(dev_size / (config.train.eval_batch_size * ranks)) * config.train.evaluations(plan.total_steps)
    return {
        "steps": plan.total_steps * (plan.accumulation * gathers * base + adapter),
        "scoring": scored * PASSES[look] * base,
        "evaluation": judged * _forwards(config) * base,
    }


def _held(engine: str, weights: HeldWeights, at: int, ranks: int) -> int:
    weight = weights.frozen[at]
    if engine == "zero3":
        return weight.held(ranks)
    return weight.held_rows(ranks) if engine == "fsdp2" else weight.whole


def _forwards(config: Config) -> int:
    """Passes of an evaluation batch: one for losses or classes, and one for every token that is written."""
    metrics, writes = config.task.metrics, config.task.type in ("causal", "seq2seq")
    if not writes:
        return 1
    return int(needs_losses(metrics)) + needs_answers(metrics) * config.task.max_target_length
