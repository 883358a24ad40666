"""What ``--resume`` means: which checkpoint, and whether it is one of this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.run.checkpoint import complete_checkpoints, newest_checkpoint


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
        return bool(complete_checkpoints(run_dir / "checkpoints"))
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
    """Refuse a checkpoint of another run: everything but lengths of time and places must be the same.

    Raises:
        UserError: naming the first key that differs.
    """
    now = config.model_dump(mode="json")
    free = {"run.output_dir", "run.name", "run.timeout_minutes", "train.micro_batch_size", "train.eval_batch_size"}
    free |= {"train.checkpoint_every", "train.checkpoint_keep", "train.eval_every", "train.max_nonfinite"}
    free |= {"scoring.keep_sketches"}
    for section, values in now.items():
        for key, value in values.items():
            old = written.get(section, {}).get(key)
            if f"{section}.{key}" not in free and value != old:
                raise UserError(
                    f"{checkpoint}: was written with {section}.{key}={old!r}, the config says {value!r}; "
                    "use the same config, or start a new run"
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
