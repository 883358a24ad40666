"""Everything that can be found wrong before the model is loaded, and the plan of the run that follows from it."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora_scale.common.errors import UserError, naming
from tsqlora_scale.common.launcher import launched_rank, launched_size, strangers
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.deepspeed_settings import check_deepspeed, check_deepspeed_sizes
from tsqlora_scale.engine.launcher_settings import check_launcher
from tsqlora_scale.model.describe import (
    check_adapter_fits,
    check_architecture,
    check_generation,
    check_weights,
    load_descriptions,
)
from tsqlora_scale.model.dropouts import set_layer_drop, set_no_rescaling
from tsqlora_scale.model.stored_quantization import check_can_unpack
from tsqlora_scale.run.rank_room import check_ranks_can_move
from tsqlora_scale.run.temporary_space import check_space

if TYPE_CHECKING:
    from tsqlora_scale.model.pass_check import PassFindings
    from tsqlora_scale.run.plan import RunPlan
    from tsqlora_scale.tasks import Data, Task

log = logging.getLogger(__name__)


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
    findings: PassFindings
    #: Of ``scoring.proxy_model``'s own run.
    proxy: Preflight | None = None
    #: Of the run of ``pretrain``, where this one starts.
    pretraining: Preflight | None = None


#: Learning rate from which on training all parameters mostly forgets what the model was pretrained for.
MOST_OF_ALL = 2e-4


def check(config: Config, *, data: Data | None = None, starts: bool = True) -> Preflight:
    """Run every check that needs no weights.

    What the data alone decides, the classes where the config names none, is in the config that is returned.

    Args:
        data: of ``config.task``, where it has been loaded already.
        starts: whether the run starts, and so reads ``adapter.init_from``; it does not go on from a checkpoint.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    check_machine(config)
    from tsqlora_scale.model.pass_check import check_pass
    from tsqlora_scale.run.plan import plan_run
    from tsqlora_scale.tasks import load_data

    data = data or load_data(config.task, seed=config.run.seed)
    config = demonstrated(config.with_labels(data.labels), data)
    check_extensions(config)
    size = len(data.pool(with_query=config.task.train_on_query))
    plan = plan_run(config, size, launched_size(), query_rows=size - len(data.train))
    check_deepspeed_sizes(config, micro_batch_size=plan.micro_batch_size, accumulation=plan.accumulation)
    check_space(config, plan.pool_size)
    described = describe(config, data, packs=config.train.packing)
    config = described.config
    task = described.task  # of fewer rows, where some gave no tokens
    plan = plan_run(config, len(task), launched_size(), query_rows=task.query_rows)
    if starts:
        check_ranks_can_move(config)
        check_base_stays_whole(config)
    check_scoring(config, described.task, starts=starts)
    dropped = set_layer_drop(described.model_config)
    if dropped and launched_rank() == 0:
        log.warning("%s of the model's config (LayerDrop) is 0 in training: every step takes every layer", dropped[0])
    if starts and config.adapter.type == "full" and config.train.lr > MOST_OF_ALL and launched_rank() == 0:
        log.warning(
            "train.lr=%g is for adapters: all parameters of a pretrained model are trained at 1e-5 to 1e-4, with a "
            "short train.lr_warmup",
            config.train.lr,
        )
    findings = check_pass(config, described.model_config, described.task)
    if starts and config.adapter.init_from is not None:
        from tsqlora_scale.run.initial_adapter import check_initial

        check_initial(config, described.model_config, unreached=findings.unreached)
    if starts and config.allocation.policy == "file":
        from tsqlora_scale.run.rank_file import check_rank_file

        check_rank_file(config, described.model_config, unreached=findings.unreached)
    proxy = None
    if starts and config.scores_by_proxy:  # a checkpoint holds its scores
        with naming_the_proxy(config):
            proxy = check(config.of_proxy(), data=described.data)
            if len(proxy.data.train) != len(described.data.train):
                raise UserError("its tokenizer makes nothing of rows that the model reads; take them out of the data")
    found = Preflight(**vars(described), plan=plan, findings=findings, proxy=proxy)
    return replace(found, pretraining=check_pretraining(found)) if starts and config.pretrains else found


def check_base_stays_whole(config: Config) -> None:
    """What takes a part of the base into the factors does not go with what drops their input.

    Raises:
        UserError: naming both keys.
    """
    adapter = config.adapter
    if adapter.starts_in_base and adapter.dropout:
        raise UserError(
            f"adapter.init={adapter.init!r} moves a part of the weight into the factors, and adapter.dropout="
            f"{adapter.dropout:g} of their input would drop that part of the base, too; set adapter.dropout=0 or "
            "adapter.init=default"
        )


def check_pretraining(after: Preflight) -> Preflight:
    """The checks of the run of ``pretrain``.

    Args:
        after: of the run that goes on with its adapter.

    Raises:
        UserError: naming the key; or the adapter of the one model does not fit the other.
    """
    from tsqlora_scale.run.plan import fitting_micro_batch
    from tsqlora_scale.tasks.rows.corpus_rows import corpus_data

    config = after.config
    with naming(f"pretrain.objective={config.pretrain.objective!r}"):
        own = config.of_pretraining()
        if config.pretrain.batch_size is not None:  # as many samples at once as the run's own take, or fewer
            size = fitting_micro_batch(own.train.batch_size, config.train.micro_batch_size, launched_size())
            own = own.model_copy(update={"train": own.train.model_copy(update={"micro_batch_size": size})})
        found = check(own, data=corpus_data(own, after.task if config.pretrain.file is None else None))
        wanted, adapted = adapted_layers(after), adapted_layers(found)
        if not wanted <= adapted:
            raise UserError(
                f"its model has no {min(wanted - adapted)} to adapt, as the task's has: its layers have other names; "
                "choose another objective, or leave pretrain out"
            )
    return found


def adapted_layers(checked: Preflight) -> set[str]:
    """Names of the linear layers that a checked run adapts."""
    from tsqlora_scale.model.base_model import skeleton
    from tsqlora_scale.model.linear_layers import resolve_targets

    config = checked.config
    trust = config.model.trust_remote_code
    bare = skeleton(checked.task.auto_class, checked.model_config, trust_remote_code=trust)
    adapter, unreached = config.adapter, checked.findings.unreached
    return set(resolve_targets(bare, adapter.target_modules, unreached=unreached, layers=adapter.layers))


def check_evaluation(config: Config, adapter: str | Path) -> Described:
    """The checks before a saved adapter is evaluated. Of the data they need the held-out set alone.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    check_machine(config)
    from tsqlora_scale.run.labels_of_run import with_labels_of
    from tsqlora_scale.tasks import load_dev

    config = with_labels_of(config, Path(adapter))
    described = describe(config, load_dev(config.task, seed=config.run.seed))
    check_adapter_fits(described.config, described.model_config, adapter)
    return described


def describe(config: Config, data: Data, *, packs: bool = False) -> Described:
    """The config's model against its files and the task's needs, and the task over ``data``.

    Args:
        packs: whether batches of the pool are laid end to end; the model must have been seen to bear it
            (:func:`.check_pass`).

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    from tsqlora_scale.model.pass_check import packer_of
    from tsqlora_scale.tasks import build_task, with_tokens
    from tsqlora_scale.tasks.objectives.prompted import check_prompt_base, prompt_base

    path = resolve(config.model.name_or_path, key="model.name_or_path")
    model_config, tokenizer = load_descriptions(config, path)
    config = config.with_task(prompt_base=prompt_base(config.task, model_config))
    check_prompt_base(config.task, model_config)
    set_no_rescaling(model_config)
    check_weights(config, path)
    check_generation(config, path, model_config)
    data = with_tokens(config.task, data, tokenizer)
    return Described(
        config=config,
        data=data,
        model_path=path,
        model_config=model_config,
        tokenizer=tokenizer,
        heads=check_architecture(config, model_config, tokenizer),
        task=build_task(config.task, data, tokenizer, model_config, packer_of(config, model_config) if packs else None),
    )


def demonstrated(config: Config, data: Data) -> Config:
    """The config with the rows that its prompts demonstrate, where it asks for some and names none."""
    if not config.task.demonstrations or config.task.demonstrated:
        return config
    from tsqlora_scale.tasks.rows.demonstrations import draw_demonstrations

    return config.with_task(demonstrated=draw_demonstrations(config.task, data.train, seed=config.run.seed))


def naming_the_proxy(config: Config) -> AbstractContextManager[None]:
    """Say of mistakes inside that they are those of ``scoring.proxy_model``."""
    return naming(f"scoring.proxy_model={config.scoring.proxy_model!r}")


def check_extensions(config: Config) -> None:
    """Code of a user's own that the config names.

    Raises:
        UserError: naming the key.
    """
    from tsqlora_scale.quality.selectors.selector_names import selector_class
    from tsqlora_scale.ranks.policies.policy_names import policy_class

    selector_class(config.sampling.selector)
    if config.adapts_ranks:
        policy_class(config.allocation.policy)


def check_scoring(config: Config, task: Task, *, starts: bool = True) -> None:
    """What the scoring pass needs of its shorter texts, and the selector of its file.

    Args:
        starts: see :func:`check`; a run that goes on may have read its file.

    Raises:
        UserError: naming the key.
    """
    if config.sampling.selector == "file" and (starts or Path(str(config.sampling.file)).exists()):
        from tsqlora_scale.quality.selectors.from_file import read_file

        read_file(config, task)
    limit = config.scoring.max_length
    if config.looks_at_pool and limit is not None:
        with naming(f"scoring.max_length={limit}"):
            task.batch([0], max_length=limit)


def check_machine(config: Config) -> None:
    """How this process was started, and what the config asks for against what is installed here and what the launcher
    was told.

    Raises:
        UserError: naming the key or the launcher's setting, its value and the remedy.
    """
    check_start()
    check_launcher(config.model, adapter=config.adapter.type)
    check_deepspeed(config)
    check_can_unpack(config.model)
    if config.model.dtype == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("model.dtype='fp16' needs a GPU; use bf16 or fp32 on a CPU")


def check_start() -> None:
    """Refuse to be one of several processes that would all do the same work, and write the same files.

    Raises:
        UserError: naming what started them, and the command that joins them.
    """
    found = strangers()
    if found is not None:
        manager, tasks = found
        alone = "srun --ntasks=1 python ..." if manager == "srun" else "python ..."
        raise UserError(
            f"{manager} has started {tasks} tasks that know nothing of one another: RANK and WORLD_SIZE are not set; "
            f"for one process: {alone}; for {tasks}: one task per machine (srun --ntasks-per-node=1) that runs "
            f"torchrun --nnodes MACHINES --nproc_per_node GPUS --rdzv_backend c10d --rdzv_endpoint HOST:PORT ..."
        )


def resumes_in(config: Config, resume: str) -> bool:
    """Whether ``--resume`` continues the run of this run folder, not that of another one."""
    return resume == "auto" or Path(resume).resolve().parent == (config.run_dir / "checkpoints").resolve()


def check_run_dir(config: Config, *, overwrite: bool, resume: str | None, adapter: str | Path | None = None) -> None:
    """Never write over a run unless asked to; nor over those before it, its proxy's and its pretraining's.

    Args:
        resume: what ``--resume`` says. A checkpoint of another folder starts a new run in this one.
        adapter: what ``--adapter`` says, if it is read.

    Raises:
        UserError: when the run folder holds a run.
    """
    from tsqlora_scale.report.record import CONTENTS
    from tsqlora_scale.run.inputs_stay import check_inputs_stay
    from tsqlora_scale.run.resume import has_checkpoint

    for before in config.runs_before:
        check_run_dir(before, overwrite=overwrite, resume=None if resume is None else "auto")
    folder = config.run_dir
    continues = resume is not None and resumes_in(config, resume)
    if not overwrite and not continues and any(os.path.lexists(folder / name) for name in CONTENTS):
        raise UserError(
            f"run folder {str(folder)!r} already holds a run; "
            "choose another run.name, or give --resume auto or --overwrite"
        )
    if (overwrite and not continues) or (continues and resume is not None and not has_checkpoint(folder, resume)):
        check_inputs_stay(config, ("--adapter", None if adapter is None else str(adapter)))
    if launched_rank() != 0:  # rank 0 alone writes, and a folder need not be on every machine
        return
    key = f"run.output_dir={shown(config.run.output_dir)}"
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):  # permission bits do not say what a disk takes
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot be written to ({error.strerror}); choose another") from None
