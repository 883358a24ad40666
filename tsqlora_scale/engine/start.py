"""Join the other processes: one Accelerator that is what the launcher asked for, on a GPU or without one."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched, launched_size
from tsqlora_scale.engine.arithmetic import set_arithmetic
from tsqlora_scale.engine.deepspeed_settings import without_own_collectives, without_what_is_off
from tsqlora_scale.engine.launcher_settings import deepspeed_wanted, fsdp_wanted

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed drives the optimizer."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def is_fsdp() -> bool:
    """Whether the processes were started for FSDP2. Accelerate itself does not know it without a GPU."""
    return launched() and fsdp_wanted()


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether a parameter is whole only while its own module runs (ZeRO-3, FSDP2)."""
    return is_fsdp() or (is_deepspeed(accelerator) and bool(accelerator.state.deepspeed_plugin.zero_stage == 3))


def _prepare_engine(deepspeed: bool) -> None:
    """What is to be done before an engine's library starts.

    Raises:
        UserError: see :func:`_prepare_fsdp`.
    """
    if fsdp_wanted():
        _prepare_fsdp()
    if deepspeed and not torch.cuda.is_available():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            without_own_collectives()


def _prepare_fsdp() -> None:
    """What Accelerate, Transformers and PyTorch would do of themselves, and must not.

    Raises:
        UserError: there are no processes to shard over.
    """
    if not launched():
        raise UserError("FSDP was asked for (ACCELERATE_USE_FSDP), but no launcher has started this process")
    # Every rank reads the base's files itself: heads and new weights are made from them before anything is sharded.
    # Else Transformers gives all ranks but one weights without values.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # of every linear layer; nobody can change these in place (fsdp_internals)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def start_accelerator(
    *,
    accumulation: int,
    mixed_precision: str = "no",
    timeout_minutes: float,
    trains: bool = True,
    deterministic: bool = False,
    tf32: bool = False,
) -> Accelerator:
    """Build the Accelerator of this process.

    Args:
        accumulation: micro-batches per optimizer step on each rank.
        mixed_precision: ``fp16`` hands loss scaling to Accelerate; with bf16, whose autocast is ours, it is ``no``.
        timeout_minutes: how long a collective may wait for a rank before the run ends.
        trains: whether there will be an optimizer; without one DeepSpeed only starts the processes.
        deterministic, tf32: see :func:`.arithmetic.set_arithmetic`.

    Raises:
        UserError: when the launcher asked for an engine that is not supported, or for several processes that
            did not come about.
    """
    set_arithmetic(deterministic=deterministic, tf32=tf32)
    handlers: list[Any] = []
    if not launched():  # a notebook that trains again, perhaps otherwise: Accelerate's state is the process's
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    deepspeed = deepspeed_wanted()
    _prepare_engine(deepspeed)
    # cpu=True is what makes Accelerate wrap a model in DDP without a GPU, and what silently disables DeepSpeed
    cpu = launched() and not deepspeed and not torch.cuda.is_available()
    if launched():
        # Without CUDA and without gloo named, Accelerate reports one process and trains the ranks apart.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=datetime.timedelta(minutes=timeout_minutes)))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it builds
        warnings.simplefilter("ignore")
        try:
            accelerator = Accelerator(
                cpu=cpu,
                mixed_precision=mixed_precision,
                # as a number it would give way to the environment, where launchers put theirs
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
                kwargs_handlers=handlers,
            )
        except (ValueError, ImportError, NotImplementedError) as error:  # of settings that it does not take
            reason = " ".join(str(error).split())
            raise UserError(f"the launcher's settings are refused by Accelerate ({reason}); correct them") from None
    wanted = launched_size()
    if accelerator.num_processes != wanted:
        raise UserError(
            f"the launcher started {wanted} processes but Accelerate sees {accelerator.num_processes}; "
            "launch with 'accelerate launch --num_processes N' and without 'cpu: true' for DeepSpeed"
        )
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed was asked for but is not in use; remove 'cpu: true' from the launcher's config")
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"distributed_type {accelerator.distributed_type.value!r} is not supported; "
            "use DDP, DeepSpeed ZeRO-2/3 or FSDP2 (configs/accelerate/)"
        )
    if is_deepspeed(accelerator):
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage == 3 and not trains:
            raise UserError(
                "a saved adapter is evaluated on a base that every process holds whole, and ZeRO-3 shards it; launch "
                "plainly, with DDP or with ZeRO-2"
            )
        if stage not in (1, 2, 3):
            raise UserError(f"zero_stage={stage} is not supported; use 2 or 3")
        without_what_is_off(accelerator.state.deepspeed_plugin.deepspeed_config)
    return accelerator
