"""A run in progress: the parts that Algorithm 1 moves, and how they are saved and restored together."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from tsqlora_scale.adapters import add_adapter, load_adapter, load_base, read_adapter, save_adapter
from tsqlora_scale.config import Config
from tsqlora_scale.engine.checkpoint import (
    WRITE_ERRORS,
    checkpoint_dir,
    complete_checkpoints,
    drop_after,
    newest_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.engine import Engine, generator_for
from tsqlora_scale.engine.sharded import write_parameter
from tsqlora_scale.engine.start import start_accelerator
from tsqlora_scale.engine.state import TrainState
from tsqlora_scale.errors import UserError
from tsqlora_scale.evaluation import evaluate
from tsqlora_scale.failures import Watchdog
from tsqlora_scale.nonfinite import NonFiniteSteps
from tsqlora_scale.preemption import StopRequest
from tsqlora_scale.preflight import Described, Preflight, RunPlan, resumes_in
from tsqlora_scale.quality import BatchSampler, QualityScorer, ScoreTable, importance_weights, select_subset
from tsqlora_scale.ranks import Policy, SensitivityTracker, TsqLoraPolicy, current_ranks, set_ranks
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.tasks import Task

log = logging.getLogger("tsqlora_scale")


@dataclass
class Run:
    """Everything that a run owns. Built by :func:`build_run`; :mod:`tsqlora_scale.train` moves it."""

    config: Config
    plan: RunPlan
    engine: Engine
    task: Task
    record: RunRecord
    tracker: SensitivityTracker | None
    scorer: QualityScorer | None
    policy: Policy | None
    stop: StopRequest
    watchdog: Watchdog
    #: Optimizer steps done.
    step: int = 0
    #: Events of the schedule done.
    events: int = 0
    sampler: BatchSampler = field(init=False)
    #: Weights of the samples' losses, (N,); none: all equal. A function of the scores in force.
    importance: np.ndarray | None = None
    first_quality: float | None = None
    #: Which pool rows have been trained on, (N,) bool.
    seen: np.ndarray = field(init=False)
    best: dict[str, Any] | None = None
    #: Name of the best step's checkpoint, or of the best before it if that could not be written. Known on rank 0.
    best_kept: str | None = None
    nonfinite: NonFiniteSteps = field(init=False)
    initial_ranks: dict[str, int] = field(default_factory=dict)
    metrics_before: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nonfinite = NonFiniteSteps(self.config.train.max_nonfinite)
        self.seen = np.zeros(self.plan.pool_size, dtype=bool)
        self.initial_ranks = current_ranks(self.engine.module)
        pool = np.arange(self.plan.pool_size)
        if self.config.adapter.method == "tsqlora" and self.config.sampling.selector == "random":
            chosen = select_subset(self.plan.pool_size, None, self.config.sampling, seed=self.config.run.seed)
            pool = np.flatnonzero(chosen)
        self.use_samples(pool, None)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.engine.world.is_main

    def use_samples(self, indices: np.ndarray, probabilities: np.ndarray | None) -> None:
        """Draw from ``indices`` by ``probabilities`` (none: uniformly) from the next step on."""
        self.sampler = BatchSampler(
            indices,
            probabilities,
            batch_size=self.config.train.batch_size,
            seed=self.config.run.seed,
            replacement=self.config.sampling.replacement and probabilities is not None,
            start=self.step,
        )

    def draw(self) -> np.ndarray:
        """The next global batch, (batch_size,) pool rows: a function of the seed and the step alone."""
        indices = self.sampler.draw(self.step)
        self.seen[indices] = True
        return indices

    def progress(self, what: str) -> Progress:
        """Progress shown by rank 0."""
        return Progress(what, shows=self.is_main, beat=self.watchdog.beat)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the development split; empty without one."""
        if self.task.dev is None:
            return {}
        with self.record.phase("evaluation"), self.progress("evaluating") as bar:
            metrics = evaluate(
                self.engine.module,
                self.task,
                self.engine.world,
                batch_size=self.config.train.eval_batch_size,
                progress=bar,
            )
        self.record.metrics(step=self.step, eval=metrics)
        return metrics

    def note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the best evaluation so far; whether this is it."""
        if not metrics:
            return False
        value = metrics[self.task.best_metric]
        if self.best is not None and (value > self.best["value"]) != self.task.higher_is_better:
            return False
        if self.best is not None and value == self.best["value"]:
            return False
        name = checkpoint_dir(Path("checkpoints"), self.step).as_posix()
        self.best = {"step": self.step, "metric": self.task.best_metric, "value": value, "checkpoint": name}
        return True

    def save_checkpoint(self) -> None:
        """Write ``checkpoints/step-…``. A collective; rank 0 writes."""
        with self.record.phase("checkpointing"):
            state = self.engine.gather()
            if self.tracker is not None:
                self.tracker.synchronize(self.engine.world)
            if self.is_main:
                self._write_checkpoint(state)
            self.engine.world.barrier()

    def _write_checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint and prune the others; on rank 0. Where it cannot be written, the run goes on without."""
        root = self.record.folder / "checkpoints"
        best_kept = self.best_kept
        if self.best is not None and self.best["step"] == self.step:
            self.best_kept = Path(self.best["checkpoint"]).name
        try:
            write_checkpoint(checkpoint_dir(root, self.step), state, self.state_dict())
        except WRITE_ERRORS as error:
            self.best_kept = best_kept
            newest = complete_checkpoints(root)
            log.warning(
                "the checkpoint of step %d cannot be written (%s); the run goes on, its newest checkpoint is %s",
                self.step,
                error,
                newest[-1].name if newest else "none",
            )
            return
        try:
            prune(root, keep=self.config.train.checkpoint_keep, protect={self.best_kept} if self.best_kept else set())
        except OSError as error:
            log.warning("older checkpoints cannot be removed (%s)", error)

    def write_on_main(self, what: str, write: Callable[[], object]) -> None:
        """Let rank 0 write. A collective.

        Raises:
            UserError: on every rank, when it cannot.
        """
        problem: str | None = None
        if self.is_main:
            try:
                write()
            except WRITE_ERRORS as error:
                problem = str(error)
        problem = self.engine.world.broadcast(problem)
        if problem is not None:
            raise UserError(f"{what} cannot be written ({problem}); make room there, then --resume auto goes on")

    def save_adapter(self) -> Path:
        """Write ``adapter/``, plain PEFT. A collective; rank 0 writes."""
        folder = self.record.folder / "adapter"
        values = {name: entry.value for name, entry in self.engine.gather().params.items()}

        def write() -> None:
            save_adapter(self.engine.module, values, folder, base_name=self.config.model.name_or_path)
            self.task.tokenizer.save_pretrained(str(folder))

        self.write_on_main(f"the adapter, {str(folder)!r},", write)
        return folder

    def state_dict(self) -> dict[str, Any]:
        """All that changes during a run, beside parameters and moments: JSON values and tensors."""
        return {
            "step": self.step,
            "events": self.events,
            "sampler": self.sampler.state_dict(),
            "ranks": current_ranks(self.engine.module),
            "initial_ranks": self.initial_ranks,
            "first_quality": self.first_quality,
            "best": self.best,
            "best_kept": self.best_kept,
            "nonfinite": self.nonfinite.count,
            "loss_scaler": self.engine.scaler_state(),
            "metrics_before": self.metrics_before,
            "seen": torch.from_numpy(self.seen.astype(np.uint8)),
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "scorer": self.scorer.state_dict() if self.scorer else None,
            "config": self.config.model_dump(mode="json"),
            "seconds": dict(self.record.seconds),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Continue from a checkpoint; parameters, moments and ranks are already in the engine."""
        self.step = tree["sampler"]["start"]
        self.seen = tree["seen"].numpy().astype(bool)
        if self.scorer is not None and tree["scorer"]["table"] is not None:
            self.scorer.load_state_dict(tree["scorer"])
            self.draw_by_scores()
        self.sampler.load_state_dict(tree["sampler"])
        self.step, self.events = tree["step"], tree["events"]
        self.first_quality, self.best, self.best_kept = tree["first_quality"], tree["best"], tree["best_kept"]
        self.nonfinite.count = tree["nonfinite"]
        self.engine.load_scaler_state(tree["loss_scaler"])
        self.metrics_before, self.initial_ranks = tree["metrics_before"], tree["initial_ranks"]
        if self.tracker is not None:
            self.tracker.load_state_dict(tree["tracker"])
        self.record.seconds.update(tree["seconds"])
        self.write_on_main(
            f"{str(self.record.folder)!r}", lambda: self.record.rewind(self.step, last_step=self.plan.total_steps)
        )

    def score(self, *, refresh: bool = False) -> ScoreTable:
        """Score the pool, or a share of S, and draw by the new scores from the next step on. A collective."""
        assert self.scorer is not None
        with self.record.phase("scoring"):
            table = self.scorer.score(self.engine.module, refresh=refresh, model_key=self.model_key())
            self._use_scores(table)
        return table

    def take_scores(self, table: ScoreTable, seconds: float) -> None:
        """Draw by the scores of another model's pass, which took ``seconds``. A collective."""
        assert self.scorer is not None
        self.scorer.adopt(table)
        self.first_quality = table.mean_quality()
        self.record.seconds["scoring"] = self.record.seconds.get("scoring", 0.0) + seconds
        self._use_scores(table)
        if not self.metrics_before:  # here, or a run killed between this checkpoint and the next would do it again
            self.metrics_before = self.evaluate()
        self.save_checkpoint()

    def _use_scores(self, table: ScoreTable) -> None:
        """Draw by the scorer's new table, and write it."""
        assert self.scorer is not None
        self.draw_by_scores()
        if self.is_main:
            try:
                table.write(self.record.folder / "scores", self.scorer.sample_ids)
            except WRITE_ERRORS as error:  # for people; the run has it in its checkpoints
                log.warning("the scores cannot be written (%s); the run goes on", error)

    def model_key(self) -> str:
        """Says which weights the model has: the base by its name, what is trained by a digest. A collective."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.engine.gather().params.items()):
            digest.update(name.encode())
            digest.update(entry.value.numpy().tobytes())
        model = self.config.model
        return f"{model.name_or_path} {model.dtype} {model.quantization} {digest.hexdigest()}"

    def draw_by_scores(self) -> None:
        """Draw from S by p, as the scores in force say (Algorithm 1, lines 4 and 9)."""
        assert self.scorer is not None
        chosen, weights = self.scorer.draws()
        self.use_samples(chosen, weights)
        if self.config.sampling.unbiased:
            self.importance = np.ones(self.plan.pool_size)
            self.importance[chosen] = importance_weights(weights, self.config.sampling.max_weight)


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
        model = build_model(config, preflight, task, device=accelerator.device)
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
            record.prepare(config.to_yaml())
        if tree is not None:
            run.load_state_dict(tree)
            if run.is_main:
                drop_after(config.run_dir / "checkpoints", run.step)
            if not resumes_in(config, str(resume)):
                run.best = run.best_kept = None  # their checkpoints lie in the other folder
    return run


def write_values(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set parameters by name. With ZeRO-3 a collective."""
    params = dict(model.named_parameters())
    for name, value in sorted(values.items()):
        write_parameter(params[name], value)


def build_model(config: Config, preflight: Preflight, task: Task, *, device: torch.device) -> Any:
    """The base with a fresh adapter, the same on every rank and engine."""
    seed = config.run.seed
    torch.manual_seed(seed)  # whatever the libraries draw and we do not redraw
    base, new_modules = load_base(
        preflight.model_path,
        config.model,
        auto_class=task.auto_class,
        model_config=preflight.model_config,
        unquantised=preflight.heads,
        generator=generator_for(seed, "head"),
        device=device,
    )
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
    lengths = task.lengths("train")

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
        strata=task.strata("train") if config.stratifies else None,
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
        base, _ = load_base(
            preflight.model_path,
            config.model,
            auto_class=task.auto_class,
            model_config=preflight.model_config,
            unquantised=preflight.heads,
            generator=generator_for(config.run.seed, "head"),
            device=accelerator.device,
        )
        model = load_adapter(base, folder, dtype=config.model.dtype).to(accelerator.device).eval()
    with Progress("evaluating", shows=world.is_main) as bar:
        metrics = evaluate(model, task, world, batch_size=config.train.eval_batch_size, progress=bar)
    return metrics, world.is_main


def has_checkpoint(run_dir: Path, resume: str) -> bool:
    """Whether ``--resume`` means a checkpoint, damaged or not.

    Raises:
        UserError: when a folder was named and is none.
    """
    if resume == "auto":
        return bool(complete_checkpoints(run_dir / "checkpoints"))
    return find_checkpoint(run_dir, resume) is not None


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


def same_method(config: Config, saved: dict[str, Any], checkpoint: Path | None) -> None:
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
            old = saved.get(section, {}).get(key)
            if f"{section}.{key}" not in free and value != old:
                raise UserError(
                    f"{checkpoint}: was written with {section}.{key}={old!r}, the config says {value!r}; "
                    "use the same config, or start a new run"
                )


@contextlib.contextmanager
def quiet_libraries() -> Any:
    """Silence what libraries print while a model loads; errors still raise."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("DeepSpeed", "accelerate", "bitsandbytes", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_logging.set_verbosity(verbosity)
