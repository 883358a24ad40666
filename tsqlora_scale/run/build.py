"""From a checked config to a :class:`~.training_run.Run`: the model, the adapter on it, the engine, the scorer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.failures import Watchdog
from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.engine import Engine, start_engine
from tsqlora_scale.engine.start import shards_parameters, start_accelerator
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.model.block_depths import lr_scales
from tsqlora_scale.model.pass_check import check_loaded
from tsqlora_scale.quality.scores.score_parts import PARTS
from tsqlora_scale.quality.selectors.selector import Selector, SelectorContext
from tsqlora_scale.quality.selectors.selector_names import selector_class
from tsqlora_scale.ranks import set_ranks
from tsqlora_scale.ranks.controller import AdaptiveRanks, FixedRanks, RankController
from tsqlora_scale.ranks.orthogonality import OrthogonalityPenalty
from tsqlora_scale.ranks.policies.policy_names import policy_class
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.adapted_model import build_model, load_adapted
from tsqlora_scale.run.auto_words import found_before, with_found_words
from tsqlora_scale.run.checkpoint import drop_after, read_checkpoint
from tsqlora_scale.run.data_init import start_from_samples
from tsqlora_scale.run.initial_adapter import start_from
from tsqlora_scale.run.old_checkpoints import of_today
from tsqlora_scale.run.plan import RunPlan
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import Described, Preflight, resumes_in
from tsqlora_scale.run.pretrained import Pretrained, write_values
from tsqlora_scale.run.rank_file import start_by_file
from tsqlora_scale.run.resume import (
    find_checkpoint,
    length_before,
    reachable,
    restated,
    same_checkpoint,
    same_data,
    same_method,
)
from tsqlora_scale.run.run_lock import RunLock
from tsqlora_scale.run.token_keeping import keep_tokens
from tsqlora_scale.run.trained_adapter import digest_of
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.evaluation import evaluate_all
from tsqlora_scale.tasks.target_scale import TargetScale, target_scale
from tsqlora_scale.tasks.task import Task

log = logging.getLogger("tsqlora_scale")


def build_run(
    preflight: Preflight,
    *,
    resume: str | None = None,
    adapter: str | None = None,
    pretrained: Pretrained | None = None,
    stop: StopRequest | None = None,
    lock: RunLock | None = None,
    writes: bool = True,
) -> Run:
    """Load the model, put the adapter on it, start the engine.

    Args:
        resume: ``auto`` (the newest complete checkpoint of the run folder, if any) or a checkpoint folder.
        adapter: a saved adapter's folder, to start from its ranks and values.
        pretrained: the adapter of a run before this one, on another head, to start from likewise.
        stop: by which the run is asked to stop; none: nothing asks.
        lock: of the folders that are written, taken here if it has not been; none: the caller is the only writer.
        writes: whether the run has a folder; else nothing is written and nothing there is looked at.
    """
    stop = stop or StopRequest()
    config, plan = preflight.config, preflight.plan
    keep_tokens(preflight)
    accelerator = started(
        config, accumulation=plan.accumulation, mixed_precision="fp16" if config.model.dtype == "fp16" else "no"
    )
    check_engine(preflight, sharded=shards_parameters(accelerator), processes=accelerator.num_processes)
    world = World.current(accelerator.device)
    if lock is not None:
        lock.take(world)
    watchdog = Watchdog(minutes=config.run.timeout_minutes, acts=accelerator.device.type == "cpu")
    record = RunRecord(config.run_dir, writes=writes and accelerator.is_main_process, device=accelerator.device)
    with record.phase("load"), quiet_libraries():
        state, tree = find_state(preflight, resume, world)
        config = taken_over(config, preflight.task, tree)
        engines: list[Engine] = []  # the selector is checked before there is one, and asks it later
        selector = build_selector(preflight, world, stop, watchdog, train_state=lambda: engines[0].gather())
        targets = scale_of_targets(preflight, world) if tree is None and adapter is None else None
        model = build_model(preflight, device=accelerator.device, init="default" if adapter else None, targets=targets)
        ranks = build_controller(config, plan, without_batch=preflight.findings.without_batch)
        start = (None if tree is None else tree["ranks"], state)
        set_start(model, preflight, *start, adapter=adapter, pretrained=pretrained, accelerator=accelerator)
        engine = start_engine(
            accelerator,
            model,
            train=config.train,
            micro_batch_size=plan.micro_batch_size,
            before_prepare=listening(ranks, selector),
            state=state,
            lr_scales=depth_scales(config),
        )
        engines.append(engine)
        check_loaded(config, engine.module, preflight.task, world)
        config = with_found_words(config, preflight.task, engine.module, world)
        run = Run(
            config=config,
            plan=plan,
            engine=engine,
            task=preflight.task,
            record=record,
            selector=selector,
            ranks=ranks,
            stop=stop,
            watchdog=watchdog,
            pretraining=None if pretrained is None else pretrained.summary,
            given_adapter=None if adapter is None else digest_of(Path(adapter)),
        )
        if writes:
            open_folder(run, tree, resume)
    return run


def check_engine(preflight: Preflight, *, sharded: bool, processes: int) -> None:
    """What several processes, and ZeRO-3 and FSDP2, do not go with.

    Raises:
        UserError: naming the key.
    """
    config, findings = preflight.config, preflight.findings
    if processes > 1 and findings.experts and (sharded or findings.trains_experts):
        what = (
            "ZeRO-3 and FSDP2 gather a layer where it is called"
            if sharded
            else f"what adapter.type={config.adapter.type!r} trains in them needs a gradient on every rank"
        )
        remedy = "use DDP or ZeRO-2, and " if sharded else "run one process, or "
        raise UserError(
            f"model.name_or_path={config.model.name_or_path!r} is a {preflight.model_config.model_type} model of "
            f"experts that are layers of their own ({min(findings.experts)}): a rank calls those that its texts are "
            f"sent to, and {what}; {remedy}leave the experts out of adapter.target_modules"
        )
    if sharded:
        check_sharding(preflight)


def check_sharding(preflight: Preflight) -> None:
    """What ZeRO-3 and FSDP2 do not go with.

    Raises:
        UserError: naming the key.
    """
    config = preflight.config
    if preflight.findings.reads_past:
        raise UserError(
            f"model.name_or_path={config.model.name_or_path!r} is a {preflight.model_config.model_type} model, whose "
            "layers read one another's weights without a call; ZeRO-3 gathers none of them then: use DDP or ZeRO-2"
        )
    if config.adapter.init == "eva":
        raise UserError(
            "adapter.init='eva' looks at samples with the base whole, which ZeRO-3 and FSDP2 share among the ranks; "
            "use DDP or ZeRO-2, or another adapter.init"
        )


def set_start(
    model: torch.nn.Module,
    preflight: Preflight,
    ranks: dict[str, int] | None,
    state: TrainState,
    *,
    adapter: str | None,
    pretrained: Pretrained | None,
    accelerator: Accelerator,
) -> None:
    """Give a fresh adapter the values that the run starts from: of the checkpoint of ``ranks`` and ``state``, if any;
    else as :func:`build_run` says, or :func:`start_new`. With ZeRO-3 a collective."""
    config = preflight.config
    if ranks is not None:
        give(model, ranks, {name: entry.value for name, entry in state.params.items()})
    elif adapter is not None:
        give(model, *adapter_type(config.adapter.type).read(model, Path(adapter)))
    elif pretrained is not None:
        pretrained.give_to(model)
    elif config.adapter.init == "eva":
        start_from_samples(model, config, preflight.task, device=accelerator.device)
    else:
        start_new(model, config, says=accelerator.is_main_process)


def find_state(preflight: Preflight, resume: str | None, world: World) -> tuple[TrainState, dict[str, Any] | None]:
    """Parameters and moments, and the rest of the run, of the checkpoint that is resumed; nothing, and None, without.
    A collective.

    Raises:
        UserError: on every rank, when the ranks find different checkpoints, or one of another run.
    """
    config = preflight.config
    checkpoint = find_checkpoint(config.run_dir, resume) if resume else None
    same_checkpoint(checkpoint, world)
    if checkpoint is None:
        return TrainState(), None
    state, tree = read_checkpoint(checkpoint, verified=resume == "auto")
    tree = of_today(tree)
    same_method(found_before(config, tree["config"]["task"]), tree["config"], checkpoint)
    same_data(preflight.task.digest(), tree["data"], checkpoint)
    reachable(preflight.plan, tree["step"], checkpoint)
    return state, tree


def taken_over(config: Config, task: Task, tree: dict[str, Any] | None) -> Config:
    """The config with the label words that a checkpoint's run found, which the task's objective then has, too.

    Args:
        tree: the checkpoint's state; None: the run is new, and its config stays as it is.
    """
    if tree is None:
        return config
    found = found_before(config, tree["config"]["task"])
    if found is not config and task.prompted is not None and isinstance(found.task.label_words, list):
        task.prompted.take_words(found.task.label_words)
    return found


def open_folder(run: Run, tree: dict[str, Any] | None, resume: str | None) -> None:
    """Make the run folder new, or go on in it from the checkpoint's state ``tree``. A collective."""
    folder, name = run.record.folder, f"{str(run.record.folder)!r}"
    continues = tree is not None and resumes_in(run.config, str(resume))
    if not continues:
        run.write_on_main(name, lambda: run.record.prepare(run.config.to_yaml()))
    if tree is not None:
        run.load_state_dict(tree)
        # first what another start would go on from, or it would find the later steps and not what led to them
        run.write_on_main(name, lambda: drop_after(folder / "checkpoints", run.step))
        run.write_on_main(name, lambda: run.record.rewind(run.step, last_step=run.plan.total_steps))
        note_length(run, length_before(tree, run.plan))
        if not continues:
            run.best = run.checkpoints.best = None  # their checkpoints lie in the other folder
        elif not run.is_over or tree["config"] != run.config.model_dump(mode="json"):
            run.write_on_main(name, lambda: run.record.change_config(run.config.to_yaml()))


def note_length(run: Run, before: int) -> None:
    """Say and note that a resumed run is longer or shorter than it was."""
    total = run.plan.total_steps
    if total == before:
        return
    run.lengths.append({"step": run.step, "before": before, "after": total})
    if run.is_main and run.early_stop is None:
        log.warning("%s", restated(run.config.train, run.plan, step=run.step, before=before))


def start_new(model: torch.nn.Module, config: Config, *, says: bool) -> None:
    """What a new run's config says of the fresh adapter's values or ranks. With ZeRO-3 a collective."""
    if config.adapter.init_from is not None:
        for line in start_from(model, config):
            if says:
                log.warning("%s", line)
    elif config.allocation.policy == "file":
        start_by_file(model, config)


def give(model: torch.nn.Module, ranks: dict[str, int], values: dict[str, torch.Tensor]) -> None:
    """Ranks by layer, and parameters by name. With ZeRO-3 a collective."""
    set_ranks(model, ranks)
    write_values(model, values)


def scale_of_targets(preflight: Preflight, world: World) -> Callable[[], TargetScale] | None:
    """Asked where a regression's targets lie, a collective; None of other tasks, and of an objective of one's own,
    whose head may mean anything."""
    task = preflight.config.task
    if task.type != "regression" or task.objective is not None:
        return None

    def asked() -> TargetScale:
        with world.together():
            return target_scale(preflight.task, task)

    return asked


def build_controller(config: Config, plan: RunPlan, *, without_batch: Collection[str] = frozenset()) -> RankController:
    """The rank half: a null object where it is off."""
    gamma = config.adapter.orthogonality
    penalty = OrthogonalityPenalty(gamma, batch_size=config.train.batch_size) if gamma else None
    if not config.adapts_ranks:
        return FixedRanks(penalty)
    assert plan.schedule is not None
    policy = policy_class(config.allocation.policy)(config.allocation)
    return AdaptiveRanks(
        config,
        policy,
        schedule=plan.schedule,
        micro_batch_size=plan.micro_batch_size,
        without_batch=without_batch,
        penalty=penalty,
    )


def build_selector(
    preflight: Preflight,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    train_state: Callable[[], TrainState] | None = None,
) -> Selector:
    """The data half: one that scores nothing where it is off."""
    config, plan = preflight.config, preflight.plan
    bar = Progress("scoring", shows=world.is_main, beat=watchdog.beat)

    def progress(done: int, total: int) -> None:
        bar(done, total)
        stop.during_scoring(world)

    context = SelectorContext(
        config=config,
        pool=preflight.task,
        theta=adapter_type(config.adapter.type).theta,
        world=world,
        scoring_step=plan.scoring_step,
        warmup_steps=plan.warmup_steps,
        events=plan.schedule.events if plan.schedule else (),
        progress=progress,
        parts_folder=config.run_dir / PARTS,
        without_batch=preflight.findings.without_batch,
        train_state=train_state,
    )
    return selector_class(config.sampling.selector)(context)


def listening(ranks: RankController, selector: Selector) -> Callable[[torch.nn.Module], None]:
    """What lets both halves hear the steps of a model."""

    def attach(module: torch.nn.Module) -> None:
        ranks.attach(module)
        selector.listener.attach(module)

    return attach


def depth_scales(config: Config) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """Learning rates by depth, ``train.lr_decay``; None where all are one."""
    decay = config.train.lr_decay
    return None if decay == 1 else partial(lr_scales, decay=decay)


def started(config: Config, **options: Any) -> Accelerator:
    """:func:`.start_accelerator` as the config says, and with further options."""
    return start_accelerator(
        timeout_minutes=config.run.timeout_minutes,
        deterministic=config.run.deterministic,
        tf32=config.model.tf32,
        **options,
    )


def evaluate_adapter(preflight: Described, adapter: str) -> dict[str, float]:
    """Metrics of a saved adapter on a fresh base. A collective."""
    config = preflight.config
    accelerator = started(config, accumulation=1, trains=False)
    world = World.current(accelerator.device)
    model = load_adapted(preflight, Path(adapter), device=accelerator.device)
    with Progress("evaluating", shows=world.is_main) as bar:
        return evaluate_all(model, preflight.task, world, batch_size=config.train.eval_batch_size, progress=bar)
