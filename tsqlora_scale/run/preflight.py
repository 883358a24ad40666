"""Everything that can be found wrong before the model is loaded, and the plan of the run that follows from it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank, launched_size
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.fields import LARGEST, as_steps
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.describe import check_adapter_fits, check_architecture, check_weights, load_descriptions
from tsqlora_scale.run.temporary_space import check_room

if TYPE_CHECKING:
    from tsqlora_scale.ranks.schedule import Schedule
    from tsqlora_scale.tasks import Data, Task


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run: sizes in samples, times in optimizer steps."""

    pool_size: int
    subset_size: int
    total_steps: int
    #: The pool is scored after this many steps; none when the data half is off.
    scoring_step: int | None
    schedule: Schedule | None
    micro_batch_size: int
    accumulation: int
    world_size: int

    def lines(self) -> list[str]:
        """What will happen when, for people."""
        lines = [
            f"pool: {self.pool_size} samples, trained on: {self.subset_size}",
            f"steps: {self.total_steps}, each of {self.micro_batch_size} samples x {self.accumulation} micro-batches "
            f"x {self.world_size} ranks",
        ]
        if self.scoring_step is not None:
            warm_up = f"after step {self.scoring_step}, on uniform samples until then"
            lines.append(f"scoring: {warm_up if self.scoring_step else 'before the first step'}")
        if self.schedule is not None:
            events = self.schedule.events
            lines.append(f"events of the schedule: {len(events)}, after steps {', '.join(map(str, events))}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the checks found out about data and model, for whoever loads the model next."""

    config: Config
    data: Data
    task: Task
    model_path: str
    model_config: Any
    tokenizer: Any
    #: Linear layers that a 4-bit base keeps in floating point.
    heads: list[str]


@dataclass(frozen=True, kw_only=True)
class Preflight(Described):
    """The same of a run that trains or scores, with its plan."""

    plan: RunPlan
    #: Of ``scoring.proxy_model``'s own run.
    proxy: Preflight | None = None


def check(config: Config, *, data: Data | None = None) -> Preflight:
    """Run every check that needs no weights.

    Args:
        data: of ``config.task``, where it has been loaded already.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    check_machine(config)
    from tsqlora_scale.tasks import load_data

    data = data or load_data(config.task, seed=config.run.seed)
    plan = plan_run(config, len(data.train), launched_size())
    if data.dev is None and config.train.eval_every:
        raise UserError(
            f"train.eval_every={config.train.eval_every} but there is nothing to evaluate on; "
            "set task.dataset.dev_file, or dev_split of a hub dataset"
        )
    check_room(config, plan.pool_size)
    described = describe(config, data)
    check_scoring(config, described.task)
    proxy = None
    if config.scores_by_proxy:
        with naming_the_proxy(config):
            proxy = check(config.of_proxy(), data=data)
    return Preflight(**vars(described), plan=plan, proxy=proxy)


def check_evaluation(config: Config, adapter: str | Path) -> Described:
    """The checks before a saved adapter is evaluated. Of the data they need the held-out set alone.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    check_machine(config)
    from tsqlora_scale.tasks import load_dev

    described = describe(config, load_dev(config.task, seed=config.run.seed))
    check_adapter_fits(config, described.model_config, adapter)
    return described


def describe(config: Config, data: Data) -> Described:
    """The config's model against its files and the task's needs, and the task over ``data``.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    from tsqlora_scale.tasks import build_task

    path = resolve(config.model.name_or_path, key="model.name_or_path")
    model_config, tokenizer = load_descriptions(config, path)
    check_weights(config, path)
    return Described(
        config=config,
        data=data,
        model_path=path,
        model_config=model_config,
        tokenizer=tokenizer,
        heads=check_architecture(config, model_config, tokenizer),
        task=build_task(config.task, data, tokenizer, model_config),
    )


@contextmanager
def naming_the_proxy(config: Config) -> Iterator[None]:
    """Say of mistakes inside that they are those of ``scoring.proxy_model``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"scoring.proxy_model={config.scoring.proxy_model!r}: {error}") from None


def check_scoring(config: Config, task: Task) -> None:
    """What the scoring pass needs of the data and of its shorter texts.

    Raises:
        UserError: naming the key.
    """
    scoring = config.scoring
    if not config.scores_data:
        return
    if scoring.convergence == "target" and task.dev is None:
        raise UserError(
            "scoring.convergence='target' needs a held-out set; "
            "set task.dataset.dev_file (dev_split of a hub dataset), or scoring.convergence=alignment"
        )
    if scoring.max_length is not None:
        try:
            task.batch("train", [0], max_length=scoring.max_length)
        except UserError as error:
            raise UserError(f"scoring.max_length={scoring.max_length}: {error}") from None


def check_machine(config: Config) -> None:
    """What the config asks for against what is installed here."""
    if config.model.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization='nf4' needs bitsandbytes; pip install 'tsqlora-scale[nf4]'")
    if config.model.dtype == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("model.dtype='fp16' needs a GPU; use bf16 or fp32 on a CPU")


def plan_run(config: Config, pool_size: int, world_size: int) -> RunPlan:
    """Steps, batches and events.

    Raises:
        UserError: when the batch does not divide, the schedule never fires, or scoring comes after the end.
    """
    from tsqlora_scale.common.random_streams import share_of
    from tsqlora_scale.ranks.schedule import Schedule

    train = config.train
    share = train.batch_size // world_size  # of a rank; more than that it never takes at once
    micro = min(train.micro_batch_size or share, share)
    if micro == 0 or train.batch_size % (micro * world_size):
        raise UserError(
            f"train.batch_size={train.batch_size} must be a multiple of micro_batch_size x ranks = "
            f"{max(micro, 1)} x {world_size}; change one of them"
        )
    group = config.sensitivity.group_size
    if isinstance(group, int) and micro % group:
        raise UserError(f"sensitivity.group_size={group} must divide the micro batch of {micro} samples")
    subset = pool_size
    if config.adapter.method == "tsqlora" and config.sampling.selector != "full":
        subset = share_of(config.sampling.keep_fraction, pool_size)
    total = train.max_steps or ceil(min((train.epochs or 0) * subset / train.batch_size, 10 * LARGEST))
    if total > LARGEST:
        raise UserError(f"train.epochs={train.epochs} is a run of {total:.3g} steps; lower it, or set train.max_steps")
    scoring_step = None
    if config.scores_data:
        scoring_step = as_steps(config.scoring.warmup_steps, total)
        if scoring_step >= total:
            raise UserError(
                f"scoring.warmup_steps={config.scoring.warmup_steps} leaves no step to train on the scores "
                f"(the run has {total}); lower it or set sampling.selector: full"
            )
        if config.scoring.proxy_model is not None:  # the warm-up is the proxy's
            scoring_step = 0
    moves = config.adapts_ranks or config.refreshes_scores
    schedule = Schedule.from_config(config.schedule, total) if moves else None
    return RunPlan(
        pool_size=pool_size,
        subset_size=subset,
        total_steps=total,
        scoring_step=scoring_step,
        schedule=schedule,
        micro_batch_size=micro,
        accumulation=train.batch_size // (micro * world_size),
        world_size=world_size,
    )


def resumes_in(config: Config, resume: str) -> bool:
    """Whether ``--resume`` continues the run of this run folder, not that of another one."""
    return resume == "auto" or Path(resume).resolve().parent == (config.run_dir / "checkpoints").resolve()


def check_run_dir(config: Config, *, overwrite: bool, resume: str | None) -> None:
    """Never write over a run unless asked to; nor over its proxy's.

    Args:
        resume: what ``--resume`` says. A checkpoint of another folder starts a new run in this one.

    Raises:
        UserError: when the run folder holds a run.
    """
    from tsqlora_scale.report.record import CONTENTS

    if config.scores_by_proxy:
        check_run_dir(config.of_proxy(), overwrite=overwrite, resume=None if resume is None else "auto")
    folder = config.run_dir
    continues = resume is not None and resumes_in(config, resume)
    if not overwrite and not continues and any(os.path.lexists(folder / name) for name in CONTENTS):
        raise UserError(
            f"run folder {str(folder)!r} already holds a run; "
            "choose another run.name, or give --resume auto or --overwrite"
        )
    if launched_rank() != 0:  # rank 0 alone writes, and a folder need not be on every machine
        return
    key = f"run.output_dir={shown(config.run.output_dir)}"
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):  # permission bits do not say what a disk takes
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot be written to ({error.strerror}); choose another") from None
