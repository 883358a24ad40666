"""The frozen base with an adapter on it: a fresh one, or one that was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.common.random_streams import generator_for, seed_libraries
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.base_model import load_base
from tsqlora_scale.model.tokenizer import prompt_ids
from tsqlora_scale.run.preflight import Described, Preflight
from tsqlora_scale.tasks.target_scale import TargetScale


def build_base(
    described: Described,
    *,
    device: torch.device,
    targets: Callable[[], TargetScale] | None = None,
    says: bool = True,
) -> tuple[torch.nn.Module, list[str]]:
    """The frozen base, a new head in it the same on every rank and engine; and the modules that train whole.

    Args:
        targets: asked where a regression's new head is to start; None: at 0.
    """
    config = described.config
    return load_base(
        described.model_path,
        config.model,
        auto_class=described.task.auto_class,
        model_config=described.model_config,
        unquantised=described.heads,
        generator=generator_for(config.run.seed, "head"),
        device=device,
        peft_task_type=described.task.peft_task_type,
        train_head=config.adapter.train_head,
        targets=targets,
        says=says,
    )


def build_model(
    preflight: Preflight,
    *,
    device: torch.device,
    init: str | None = None,
    targets: Callable[[], TargetScale] | None = None,
) -> Any:
    """The base with a fresh adapter, the same on every rank and engine.

    Args:
        init: in the place of ``adapter.init``: a saved adapter is for the base as it is, whatever it started from.
        targets: see :func:`build_base`.
    """
    config, task, seed = preflight.config, preflight.task, preflight.config.run.seed
    seed_libraries(seed)
    base, new_modules = build_base(preflight, device=device, targets=targets)
    placement = Placement(
        config.adapter if init is None else config.adapter.model_copy(update={"init": init}),
        task_type=task.peft_task_type,
        new_modules=new_modules,
        dtype=config.model.dtype,
        generator=generator_for(seed, "adapter"),
        unreached=preflight.findings.unreached | preflight.findings.idle,
        prompt_ids=prompt_ids(config.adapter, preflight.tokenizer),
    )
    return adapter_type(config.adapter.type).build(base, placement)


def load_adapted(described: Described, adapter: Path, *, device: torch.device) -> Any:
    """A saved adapter on a fresh base, in evaluation mode."""
    config = described.config
    with quiet_libraries():
        base, _ = build_base(described, device=device, says=False)  # the adapter has its own head
        return adapter_type(config.adapter.type).load(base, adapter, dtype=config.model.dtype).to(device).eval()
