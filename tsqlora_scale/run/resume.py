"""What ``--resume`` means: which checkpoint, and whether it is one of this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.fields import as_steps
from tsqlora_scale.config.schema import Config, TrainConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.run.checkpoint import has_checkpoints, newest_checkpoint
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.run.plan import RunPlan, total_steps

#: Keys that may differ between a run and its continuation, and what a change does. All others must be the same.
MAY_CHANGE = {
    "run.output_dir": "another folder: a new run in it, from that checkpoint on",
    "run.name": "the same",
    "run.timeout_minutes": "nothing of the result",
    "adapter.init_from": "nothing: only a start reads it",
    "task.token_cache": "nothing of the result",
    "task.tokenize_workers": "the same",
    "train.max_steps": "longer or shorter, not below the step reached: what follows from the length is taken anew",
    "train.epochs": "the same; one of the two may take the other's place",
    "train.micro_batch_size": "masks of dropout (DeBERTa: its sensitivity, too); else the last bits of sums",
    "train.packing": "the same",
    "train.eval_batch_size": "nothing but the last bits of sums",
    "train.checkpoint_every": "which checkpoints there are",
    "train.checkpoint_keep": "the same",
    "train.eval_every": "when it is evaluated, and so which checkpoint can be the best",
    "train.eval_on_start": "nothing: only a start does it",
    "train.keep": "what adapter/ holds at the end",
    "train.patience": "when it ends early; a larger one lets a run that has go on",
    "train.max_nonfinite": "when the run is given up",
    "scoring.keep_sketches": "what is left in score-parts/",
}


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` means, verified if by ``auto``; none when that finds none.

    Raises:
        UserError: when a folder was named and is none, or ``auto`` finds damaged checkpoints only.
    """
    if resume == "auto":
        return newest_checkpoint(run_dir / "checkpoints")
    if not Path(resume).is_dir():
        raise UserError(f"--resume {resume!r} is no checkpoint folder; give 'auto' or a step-… folder")
    return Path(resume)


def has_checkpoint(run_dir: Path, resume: str) -> bool:
    """Whether ``--resume`` means a checkpoint, damaged or not.

    Raises:
        UserError: when a folder was named and is none.
    """
    if resume == "auto":
        return has_checkpoints(run_dir / "checkpoints")
    return find_checkpoint(run_dir, resume) is not None


def same_checkpoint(checkpoint: Path | None, world: World) -> None:
    """All ranks must have found the same checkpoint. A collective.

    Raises:
        UserError: on every rank.
    """
    found = world.gather_objects(checkpoint.name if checkpoint else "none")
    if len(set(found)) > 1:
        raise UserError(
            f"--resume finds different checkpoints on different machines ({', '.join(sorted(set(found)))}); "
            "put the run folder on a disk that all of them share, or copy it"
        )


def same_method(config: Config, written: dict[str, Any], checkpoint: Path | None) -> None:
    """Refuse a checkpoint of another run: everything but :data:`MAY_CHANGE` must be the same.

    Args:
        written: the config in the checkpoint; a key that its release did not know had today's default.

    Raises:
        UserError: naming the first key that differs.
    """
    for section, values in config.model_dump(mode="json").items():
        fields = type(getattr(config, section)).model_fields
        for key, value in values.items():
            old = written.get(section, {}).get(key, fields[key].get_default(call_default_factory=True))
            if f"{section}.{key}" not in MAY_CHANGE and value != old:
                remedy = "use the same config, or start a new run"
                if key == "average_every":  # which follows from eval_every where the file does not say it
                    remedy = f"set train.average_every={old}, or start a new run"
                raise UserError(
                    f"{checkpoint}: was written with {section}.{key}={old!r}, the config says {value!r}; {remedy}"
                )


def length_before(tree: dict[str, Any], plan: RunPlan) -> int:
    """Optimizer steps of the whole run, as the config in a checkpoint's state has it.

    Args:
        plan: of the run that goes on, on the same data.
    """
    return total_steps(TrainConfig.model_validate(tree["config"]["train"]), plan.subset_size)


def reachable(plan: RunPlan, step: int, checkpoint: Path | None) -> None:
    """Refuse a run that would end before it begins.

    Raises:
        UserError: naming the lengths.
    """
    if plan.total_steps < step:
        raise UserError(
            f"{checkpoint}: has done {step} steps, and train.max_steps (or train.epochs) now makes "
            f"{plan.total_steps}; give {step} or more, or start a new run"
        )


def restated(train: TrainConfig, plan: RunPlan, *, step: int, before: int) -> str:
    """What becomes of a run at ``step`` that had ``before`` steps and has the plan's now, in one line."""
    total = plan.total_steps
    old, new = (learning_rate(train, min(step, length - 1), length) for length in (before, total))
    warmup = as_steps(train.lr_warmup, total)
    parts = [
        f"the run of {before} steps goes on from step {step} to step {total}",
        f"train.lr_schedule={train.lr_schedule} is restated for that length: learning rate {old:.3g} -> {new:.3g} "
        f"here, warm-up of {warmup} steps",
    ]
    if plan.scoring_step is not None and step <= plan.scoring_step < total:
        parts.append(f"the pool is scored after step {plan.scoring_step}")
    if plan.schedule is not None:
        left = [str(event) for event in plan.schedule.events if event > step]
        parts.append(f"events of the schedule still come after steps {', '.join(left)}" if left else "no event is left")
    return "; ".join(parts)


def same_adapter(given: str | None, before: str | None) -> None:
    """Refuse to go on with another trained adapter's pass of scores, or without the one that it was begun with.

    Args:
        given: digest of the adapter that is given now; none: no adapter.
        before: the same of the run that wrote the checkpoint.

    Raises:
        UserError: they differ.
    """
    if given != before:
        what = "without --adapter" if before is None else "with another --adapter" if given else "with an --adapter"
        raise UserError(
            f"--resume: the pass was begun {what}, whose scores these would be; give what it was begun with, or "
            "--overwrite to score anew"
        )


def same_data(digest: str, written: str, checkpoint: Path | None) -> None:
    """Refuse a checkpoint of other data behind the same config: draws and scores go by a row's place.

    Raises:
        UserError: naming the checkpoint.
    """
    if digest != written:
        raise UserError(
            f"{checkpoint}: was written with other training data than task.dataset gives now, of the same place; "
            "give the same rows in the same order, or start a new run"
        )
