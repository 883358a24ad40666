"""Tasks of EleutherAI's lm-evaluation-harness on a trained adapter and on its base, by their own names."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_size
from tsqlora_scale.common.printing import shown
from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries
from tsqlora_scale.config.schema import Config

#: Of metrics whose error has no closed form.
BOOTSTRAPS = 1000

#: Task -> metric -> ``base``, ``adapter`` and, where the harness knows them, ``base_stderr`` and ``adapter_stderr``.
TaskResults = dict[str, dict[str, dict[str, float]]]


def evaluate_tasks(
    config: Config,
    adapter: str | Path,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> TaskResults:
    """Measure tasks of lm-evaluation-harness before and after training, by its ``simple_evaluate``. In one process.

    Args:
        config: of the run; its data are not read.
        adapter: an adapter's folder, a run folder or a checkpoint.
        tasks: names of tasks, groups or tags, with ``*`` for any letters.
        folder: of tasks of one's own, as YAML.
        limit: rows of every task at most, for a trial.
        shots: examples in a prompt, in the place of the tasks' own.

    Raises:
        UserError: the harness is not installed, the model does not generate, a task is unknown or its data cannot be
            had, or as ``evaluate``.
    """
    prepare_environment()
    _check_request(config, tasks, folder=folder, limit=limit, shots=shots)
    from tsqlora_scale.run.trained_adapter import adapter_folder

    with adapter_folder(adapter) as place:
        manager, names = _known(tasks, folder)
        options = {"task_manager": manager, "tasks": names, "limit": limit, "num_fewshot": shots}
        before, after = (
            _measure(model, tokenizer, config, options) for model, tokenizer in _before_and_after(config, place)
        )
    return _side_by_side(before, after)


def _check_request(
    config: Config, tasks: Sequence[str], *, folder: str | Path | None, limit: int | None, shots: int | None
) -> None:
    """What can be seen before anything is imported or loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-evaluation-harness; pip install 'tsqlora-scale[lm_eval]'")
    if config.task.type != "causal":
        raise UserError(
            f"--lm-eval is for models that go on with a text (task.type=causal), not task.type={config.task.type}; "
            "leave it out, and the held-out set is measured"
        )
    if launched_size() > 1:
        raise UserError(f"--lm-eval works in one process, not in {launched_size()}; start it without a launcher")
    if not tasks or not all(tasks):
        raise UserError(f"--lm-eval {','.join(tasks)!r}: give names of tasks, as hellaswag,arc_easy")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--lm-eval-tasks {str(folder)!r}: no such folder")
    if limit is not None and limit < 1:
        raise UserError(f"--lm-eval-limit {limit}: must be 1 or more")
    if shots is not None and shots < 0:
        raise UserError(f"--lm-eval-shots {shots}: must be 0 or more")


def _known(tasks: Sequence[str], folder: str | Path | None) -> tuple[Any, list[str]]:
    """The harness' index of tasks, and the names in it that are meant; their data are opened.

    Raises:
        UserError: a task that is not there, or whose data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    own = None if folder is None else str(folder)
    manager = TaskManager(include_path=own, include_defaults=False) if own else None
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=own)  # reads thousands of files
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(
                f"--lm-eval {task!r} is no task that lm-evaluation-harness knows; lm-eval ls tasks lists them, and "
                "--lm-eval-tasks FOLDER adds one's own"
            )
    names = sorted({name for task in tasks for name in manager.match_tasks([task])})
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # of the hub, of datasets, and of what a task's own file says
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"--lm-eval: the task {name} cannot be prepared ({reason}); without a network its data must have been "
                "fetched before"
            ) from None
    return manager, names


def _before_and_after(config: Config, adapter: Path) -> Iterator[tuple[Any, Any]]:
    """The base, then the adapter on it, which may change the base itself; each with the tokenizer."""
    import torch
    from torch import nn

    from tsqlora_scale.model.adapted_base import AdaptedBase
    from tsqlora_scale.model.adapters.adapter_type import adapter_type, own_type
    from tsqlora_scale.model.base_model import DTYPES
    from tsqlora_scale.model.dropouts import set_no_rescaling
    from tsqlora_scale.run.build import started
    from tsqlora_scale.run.preflight import check_machine

    check_machine(config)
    described = AdaptedBase.checked(config, adapter)
    set_no_rescaling(described.model_config)  # as in training; a merge keeps the model's own
    device = started(config, accumulation=1, trains=False).device
    with quiet_libraries():
        base = described.load(device=device).eval()
    nn.Module.to(base, device)  # Transformers' own refuses to move a 4-bit base, which is there already
    base.config.use_cache = True  # for tasks that generate
    dtype, own = config.model.dtype, own_type(config.adapter.type)
    # as with the adapter on it (use_autocast)
    narrow = dtype == "bf16" or (dtype == "fp16" and own is not None)
    with torch.autocast(device.type, dtype=DTYPES[dtype], enabled=narrow):
        yield base, described.tokenizer
    with quiet_libraries():
        model = adapter_type(config.adapter.type).load(base, adapter, dtype=config.model.dtype).to(device).eval()
    yield model, described.tokenizer


def _measure(model: Any, tokenizer: Any, config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """The harness' own results, by task.

    Raises:
        UserError: what it says of a task that it does not run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from tsqlora_scale.model.adapters.adapter_type import own_type

    own = own_type(config.adapter.type)
    ahead = 0 if own is None else own.tokens_ahead(config.adapter)
    model.tie_weights = lambda *_, **__: None  # the harness ties again, and an adapter may sit on a head that is tied
    keys = {"pretrained": model, "tokenizer": tokenizer, "batch_size": config.train.eval_batch_size}
    try:
        wrapped = HFLM(**keys)
        if ahead:  # the base's texts are cut where the adapter's are
            wrapped = HFLM(**keys, max_length=wrapped.max_length - ahead)
        found = lm_eval.simple_evaluate(model=wrapped, log_samples=False, bootstrap_iters=BOOTSTRAPS, **options)
    except (ValueError, OSError, ImportError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"--lm-eval {shown(','.join(options['tasks']))}: the harness says {reason}") from None
    assert found is not None
    return dict(found["results"])


def _side_by_side(before: dict[str, Any], after: dict[str, Any]) -> TaskResults:
    """Of every task its metrics; one that is taken through a filter bears the filter's name."""
    results: TaskResults = {}
    for task in after:
        for key, value in after[task].items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            row = {"base": float(before[task][key]), "adapter": float(value)}
            for side, found in (("base", before), ("adapter", after)):
                error = found[task].get(f"{name}_stderr,{filtered}")
                if isinstance(error, int | float):
                    row[f"{side}_stderr"] = float(error)
            results.setdefault(task, {})[name if filtered == "none" else f"{name} ({filtered})"] = row
    return results
