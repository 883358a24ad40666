"""From a checked config to a :class:`~.training_run.Run`: the model, the adapter on it, the engine, the scorer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.failures import Watchdog
from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.engine import Engine, generator_for
from tsqlora_scale.engine.sharded import write_parameter
from tsqlora_scale.engine.start import start_accelerator
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.model.adapters.lora import add_adapter, load_adapter, load_base, read_adapter
from tsqlora_scale.quality import QualityScorer
from tsqlora_scale.ranks import SensitivityTracker, TsqLoraPolicy, set_ranks
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.checkpoint import drop_after, read_checkpoint
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import Described, Preflight, RunPlan, resumes_in
from tsqlora_scale.run.resume import find_checkpoint, same_checkpoint, same_data, same_method
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.evaluation import evaluate


def build_run(
    preflight: Preflight, *, resume: str | None = None, adapter: str | None = None, stop: StopRequest | None = None
) -> Run:
    """Load the model, put the adapter on it, start the engine.

    Args:
        resume: ``auto`` (the newest complete checkpoint of the run folder, if any) or a checkpoint folder.
        adapter: a saved adapter's folder, to start from its ranks and values.
        stop: by which the run is asked to stop; none: nothing asks.
    """
    stop = stop or StopRequest()
    config, plan = preflight.config, preflight.plan
    accelerator = start_accelerator(
        accumulation=plan.accumulation,
        mixed_precision="fp16" if config.model.dtype == "fp16" else "no",
        timeout_minutes=config.run.timeout_minutes,
    )
    watchdog = Watchdog(minutes=config.run.timeout_minutes, acts=accelerator.device.type == "cpu")
    record = RunRecord(config.run_dir, writes=accelerator.is_main_process)
    checkpoint = find_checkpoint(config.run_dir, resume) if resume else None
    with record.phase("load"), quiet_libraries():
        task = preflight.task
        same_checkpoint(checkpoint, World.current(accelerator.device))
        state, tree = read_checkpoint(checkpoint, verified=resume == "auto") if checkpoint else (TrainState(), None)
        if tree is not None:
            same_method(config, tree["config"], checkpoint)
            same_data(task.digest("train"), tree["data"], checkpoint)
        model = build_model(preflight, device=accelerator.device)
        tracker = None
        if config.adapts_ranks:
            tracker = SensitivityTracker(
                config.sensitivity,
                batch_size=config.train.batch_size,
                micro_batch_size=plan.micro_batch_size,
                sketch_seed=config.run.seed if config.resize.grow_init == "gradient" else None,
                events=plan.schedule.events if plan.schedule else (),
            )
        if tree is not None:
            set_ranks(model, tree["ranks"])
            write_values(model, {name: entry.value for name, entry in state.params.items()})
        elif adapter is not None:
            ranks, values = read_adapter(model, Path(adapter))
            set_ranks(model, ranks)
            write_values(model, values)
        engine = Engine(
            accelerator,
            model,
            train=config.train,
            micro_batch_size=plan.micro_batch_size,
            before_prepare=tracker.attach if tracker else None,
            state=state,
        )
        run = Run(
            config=config,
            plan=plan,
            engine=engine,
            task=task,
            record=record,
            tracker=tracker,
            scorer=build_scorer(config, plan, engine, task, stop, watchdog) if config.scores_data else None,
            policy=TsqLoraPolicy(config.allocation) if tracker else None,
            stop=stop,
            watchdog=watchdog,
        )
        if tree is None or not resumes_in(config, str(resume)):
            run.write_on_main(f"{str(record.folder)!r}", lambda: record.prepare(config.to_yaml()))
        if tree is not None:
            run.load_state_dict(tree)
            run.write_on_main(f"{str(record.folder)!r}", lambda: drop_after(record.folder / "checkpoints", run.step))
            if not resumes_in(config, str(resume)):
                run.best = run.best_kept = None  # their checkpoints lie in the other folder
    return run


def write_values(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set parameters by name. With ZeRO-3 a collective."""
    params = dict(model.named_parameters())
    for name, value in sorted(values.items()):
        write_parameter(params[name], value)


def build_base(described: Described, *, device: torch.device) -> tuple[torch.nn.Module, list[str]]:
    """The frozen base, a new head in it the same on every rank and engine; and the modules that are new."""
    config = described.config
    return load_base(
        described.model_path,
        config.model,
        auto_class=described.task.auto_class,
        model_config=described.model_config,
        unquantised=described.heads,
        generator=generator_for(config.run.seed, "head"),
        device=device,
    )


def build_model(preflight: Preflight, *, device: torch.device) -> Any:
    """The base with a fresh adapter, the same on every rank and engine."""
    config, task, seed = preflight.config, preflight.task, preflight.config.run.seed
    torch.manual_seed(seed)  # whatever the libraries draw and we do not redraw
    base, new_modules = build_base(preflight, device=device)
    return add_adapter(
        base,
        config.adapter,
        task_type=task.peft_task_type,
        new_modules=new_modules,
        dtype=config.model.dtype,
        generator=generator_for(seed, "adapter"),
    )


def build_scorer(
    config: Config, plan: RunPlan, engine: Engine, task: Task, stop: StopRequest, watchdog: Watchdog
) -> QualityScorer:
    """The scorer, given the task's batches and per-sample losses as callables."""
    device = engine.world.device
    limit = config.scoring.max_length
    with engine.world.together():  # a pool's columns may not find room on one rank alone
        lengths = task.lengths("train")
        strata = task.strata("train") if config.stratifies else None

    def batch_of(indices: np.ndarray) -> Any:
        return task.batch("train", indices, max_length=limit).to(device)

    def losses(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        sums, counts = task.losses(module(**batch.inputs), batch)
        return sums / counts

    bar = Progress("scoring", shows=engine.world.is_main, beat=watchdog.beat)

    def progress(done: int, total: int) -> None:
        bar(done, total)
        stop.during_scoring(engine.world)

    def target_batches() -> Iterable[Any]:
        assert task.dev is not None
        size = 32 if config.scoring.batch_size == "auto" else config.scoring.batch_size
        for start in range(0, len(task.dev), size):
            rows = np.arange(start, min(start + size, len(task.dev)))
            yield task.batch("dev", rows, max_length=limit).to(device)

    return QualityScorer(
        config.scoring,
        config.sampling,
        seed=config.run.seed,
        eta=config.scoring.eta or config.train.lr,
        sample_ids=task.train["sample_id"],
        content=task.digest("train"),
        world=engine.world,
        batch_of=batch_of,
        losses=losses,
        target_batches=target_batches if config.scoring.convergence == "target" else None,
        progress=progress,
        length_of=lambda indices: lengths[indices],
        strata=strata,
        parts_folder=config.run_dir / "scores" / "parts",
    )


def evaluate_adapter(preflight: Described, adapter: str) -> tuple[dict[str, float], bool]:
    """Metrics of a saved adapter on a fresh base, and whether this process should print them. A collective."""
    config = preflight.config
    folder = Path(adapter)
    accelerator = start_accelerator(accumulation=1, timeout_minutes=config.run.timeout_minutes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("evaluation of a saved adapter runs without DeepSpeed; launch it plainly or with DDP")
    world = World.current(accelerator.device)
    with quiet_libraries():
        task = preflight.task
        base, _ = build_base(preflight, device=accelerator.device)
        model = load_adapter(base, folder, dtype=config.model.dtype).to(accelerator.device).eval()
    with Progress("evaluating", shows=world.is_main) as bar:
        metrics = evaluate(model, task, world, batch_size=config.train.eval_batch_size, progress=bar)
    return metrics, world.is_main
