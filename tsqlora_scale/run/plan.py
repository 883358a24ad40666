"""The numbers of a run: how many steps, of what, and when something happens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.fields import LARGEST, as_steps
from tsqlora_scale.config.quality_sections import BLIND_SELECTORS
from tsqlora_scale.config.schema import Config, TrainConfig
from tsqlora_scale.quality.draws.subset import share_of
from tsqlora_scale.ranks.schedule import Schedule


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run: sizes in samples, times in optimizer steps."""

    pool_size: int
    subset_size: int
    total_steps: int
    #: The pool is scored after this many steps, which need not be reached where the steps score it; none when the data
    #: half is off.
    scoring_step: int | None
    schedule: Schedule | None
    micro_batch_size: int
    accumulation: int
    world_size: int
    #: Whether the training steps score the pool.
    scores_online: bool = False
    #: What those say in so many first steps does not count.
    warmup_steps: int = 0
    #: Samples at the pool's end that are the query's own.
    query_rows: int = 0
    #: Whether ``subset_size`` is only the most that it can be: the selector finds how many.
    finds_size: bool = False

    def lines(self) -> list[str]:
        """What will happen when, for people."""
        queried = f", {self.query_rows} of them the query's" if self.query_rows else ""
        most = "as many as are found to be wanted, at most " if self.finds_size else ""
        lines = [
            f"pool: {self.pool_size} samples{queried}, trained on: {most}{self.subset_size}",
            f"steps: {self.total_steps}, each of {self.micro_batch_size} samples x {self.accumulation} micro-batches "
            f"x {self.world_size} ranks",
        ]
        if self.scoring_step is not None and self.scores_online:
            draws = f"all draws are even, as by scores they would be after step {self.scoring_step}"
            if self.scoring_step < self.total_steps:
                draws = f"draws are even up to step {self.scoring_step}"
            lines.append(f"scoring: by the training steps after step {self.warmup_steps}; {draws}")
        elif self.scoring_step is not None:
            warm_up = f"after step {self.scoring_step}, on uniform samples until then"
            lines.append(f"scoring: {warm_up if self.scoring_step else 'before the first step'}")
        if self.schedule is not None:
            events = self.schedule.events
            lines.append(f"events of the schedule: {len(events)}, after steps {', '.join(map(str, events))}")
        return lines


def plan_run(config: Config, pool_size: int, world_size: int, *, query_rows: int = 0) -> RunPlan:
    """Steps, batches and events.

    Args:
        pool_size: samples, the query's among them.
        query_rows: how many these are; all belong to S.

    Raises:
        UserError: when the batch does not divide, the schedule never fires, or scoring comes after the end.
    """
    micro = _micro_batch_size(config, world_size)
    subset = subset_size(config, pool_size, query_rows)
    total = total_steps(config.train, subset)
    schedule = check_length(config, total)
    return RunPlan(
        pool_size=pool_size,
        subset_size=subset,
        total_steps=total,
        scoring_step=_scoring_step(config, total, pool_size),
        schedule=schedule,
        micro_batch_size=micro,
        accumulation=config.train.batch_size // (micro * world_size),
        world_size=world_size,
        scores_online=config.scores_online,
        warmup_steps=as_steps(config.scoring.warmup_steps, total) if config.scores_online else 0,
        query_rows=query_rows,
        finds_size=config.finds_size,
    )


def subset_size(config: Config, pool_size: int, query_rows: int) -> int:
    """Samples of S, at most, the query's among them, as in :func:`plan_run`."""
    if config.sampling.selector == "full":
        return pool_size
    return share_of(config.sampling.most_kept, pool_size - query_rows) + query_rows


def check_length(config: Config, total: int) -> Schedule | None:
    """Whether all that is to happen within a run happens within ``total`` steps; its events, if there are any.

    Raises:
        UserError: naming the key.
    """
    every, warmup = config.train.average_every, config.scoring.warmup_steps
    if every is not None and every > total:
        raise UserError(f"train.average_every={every} takes no snapshot in a run of {total} steps; lower it")
    if every is not None and every >= total and config.train.distill is not None:
        raise UserError(
            f"train.distill learns from snapshots, and train.average_every={every} takes the first one after the last "
            f"of {total} steps; lower it"
        )
    warms_up = config.sampling.selector not in BLIND_SELECTORS and not config.looks_before_training
    if warms_up and as_steps(warmup, total) >= total:
        raise UserError(
            f"scoring.warmup_steps={warmup} leaves no step to train on the scores (the run has {total}); lower it or "
            "set sampling.selector: full"
        )
    moves = config.adapts_ranks or config.refreshes_scores
    return Schedule.from_config(config.schedule, total) if moves else None


def _micro_batch_size(config: Config, world_size: int) -> int:
    train = config.train
    share = train.batch_size // world_size  # of a rank; more than that it never takes at once
    micro = min(train.micro_batch_size or share, share)
    if micro == 0 or train.batch_size % (micro * world_size):
        raise UserError(
            f"train.batch_size={train.batch_size} must be a multiple of micro_batch_size x ranks = "
            f"{max(micro, 1)} x {world_size}; change one of them"
        )
    group = config.sensitivity.group_size
    if config.adapts_ranks and isinstance(group, int) and micro % group:
        raise UserError(
            f"sensitivity.group_size={group} must divide the micro batch of {micro} samples; choose a divisor, or auto"
        )
    return micro


def fitting_micro_batch(batch_size: int, most: int | None, world_size: int) -> int | None:
    """The largest micro-batch of at most ``most`` samples into which a rank's share of a step divides.

    None, which means all of the share at once, where nothing bounds it, or where ranks do not divide the step, which is
    :func:`plan_run`'s to refuse.
    """
    share, left = divmod(batch_size, world_size)
    if most is None or left:
        return None
    return max(size for size in range(1, min(most, share) + 1) if share % size == 0)


def total_steps(train: TrainConfig, subset: int) -> int:
    """Optimizer steps of a run that trains on ``subset`` samples.

    Raises:
        UserError: more than can be counted here.
    """
    total = train.max_steps or ceil(min((train.epochs or 0) * subset / train.batch_size, 10 * LARGEST))
    if total > LARGEST:
        raise UserError(f"train.epochs={train.epochs} is a run of {total:.3g} steps; lower it, or set train.max_steps")
    return total


def _scoring_step(config: Config, total: int, pool_size: int) -> int | None:
    if config.sampling.selector in BLIND_SELECTORS:
        return None
    if config.looks_before_training:
        return 0
    step = as_steps(config.scoring.warmup_steps, total)
    if config.scores_online:  # the end of the first epoch of which half or more comes after the warm-up
        epoch = ceil(pool_size / config.train.batch_size)
        return epoch * ceil(step / epoch + 0.5)
    return 0 if config.scores_by_proxy else step  # the warm-up is the proxy's


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every ``every`` steps happens after ``step``."""
    return every is not None and step % every == 0
