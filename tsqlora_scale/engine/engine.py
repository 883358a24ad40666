"""The seam between the loop and the machinery: one step, one gather, one rebuild, whatever the launcher chose.

An engine knows parameters by name; it does not know what a rank is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from tsqlora_scale.config.schema import TrainConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import TrainState


class Engine(Protocol):
    """A model under training, wrapped by whatever the launcher asked for."""

    #: The ranks.
    world: World

    @property
    def name(self) -> str:
        """What the engine really is: ``plain``, ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``."""
        ...

    @property
    def distributed_type(self) -> str:
        """Accelerate's name of it."""
        ...

    @property
    def module(self) -> nn.Module:
        """The unwrapped model. Score and evaluate through it, never through the engine's wrapper: under ZeRO-3 a
        foreign backward through the wrapper changes the next step without a word."""
        ...

    @property
    def gradient_scale(self) -> float:
        """How much larger the gradients inside a backward pass are than those of the step's loss.

        Accelerate and DeepSpeed divide by the accumulation before the backward pass; averaging over ranks and a
        loss scaler's factor come after it.
        """
        ...

    @property
    def overflow_is_normal(self) -> bool:
        """Whether a gradient that is not finite may be the work of a loss scaler still looking for its scale (fp16)."""
        ...

    def micro_batch(self) -> AbstractContextManager[None]:
        """Around one micro-batch's forward and backward: no gradient exchange before the last of the step."""
        ...

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The training forward."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's share of the step's loss; the last one's exchanges gradients.

        Args:
            loss: this micro-batch's part of the loss, normalised over the whole step.
        """
        ...

    def step(self, lr: float) -> float:
        """The optimizer step, after the last micro-batch's backward. A collective.

        The optimizer does not step, and nothing that it keeps changes, where the norm is not finite: it is that of the
        exchanged gradient, so all ranks decide alike.

        Args:
            lr: learning rate of the step, before each parameter's own factor.

        Returns:
            The gradient's 2-norm before clipping.
        """
        ...

    def gather(self) -> TrainState:
        """Every trainable parameter and its moments, whole, on every rank. A collective.

        Raises:
            ReplicasDiffer: on every rank, where one holds others than the rest, or something trains that the engine
                was not started with.
        """
        ...

    def rebuild(self, change: Callable[[nn.Module, TrainState], TrainState]) -> None:
        """Gather, take the engine down, let ``change`` alter the module, and prepare again. A collective.

        The frozen base stays where it is: no rank sends it, under ZeRO-3 and FSDP2 nothing of it is gathered or sharded
        anew. Before and after, the ranks compare what they hold, as in :meth:`gather`.

        Args:
            change: alters the module in place and returns the state of its trainable parameters, by name; it runs
                on every rank and must do the same on each.
        """
        ...

    def holding(self, values: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, trained parameters have other values, and afterwards their own again, to the bit; on entering and on
        leaving a collective. The optimizer's own copies of them are left alone, and no gradient is to flow meanwhile.

        Args:
            values: full, of the parameters' shapes, by name.
        """
        ...

    def close(self) -> None:
        """Take the engine down; the module stays. A collective."""
        ...

    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's loss scaler: its scale and what moves it. None without one."""
        ...

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a :meth:`scaler_state`, also where there was or is no scaler."""
        ...

    def frozen_parameters(self) -> dict[str, Any]:
        """The frozen base: how many parameters there are (``all``), how many of them this rank holds only a part of
        (``sharded``), and the ``bytes`` of what it holds by type, between uses."""
        ...


def start_engine(
    accelerator: Accelerator,
    module: nn.Module,
    *,
    train: TrainConfig,
    micro_batch_size: int,
    before_prepare: Callable[[nn.Module], None] | None = None,
    state: TrainState | None = None,
    lr_scales: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> Engine:
    """The engine that the launcher asked for.

    Args:
        accelerator: from :func:`tsqlora_scale.engine.start.start_accelerator`.
        module: the model, trainable parameters in float32 with ``requires_grad``.
        train: learning-rate-free optimizer settings are read from here (betas, eps, weight decay, clipping).
        micro_batch_size: samples per rank and backward pass.
        before_prepare: called with the module before every ``prepare``: where hooks are attached that must sit
            inside the engine's own.
        state: moments and step count to start from (a resumed run); values must already be in ``module``.
        lr_scales: what the learning rate of each of a module's trained parameters is multiplied by, by name, asked for
            before every ``prepare``; none: nothing.

    Raises:
        ReplicasDiffer: on every rank, where one was given, or has restored, another ``state`` than the rest.
    """
    from tsqlora_scale.engine.ddp import DdpEngine
    from tsqlora_scale.engine.fsdp import FsdpEngine
    from tsqlora_scale.engine.start import is_deepspeed, is_fsdp
    from tsqlora_scale.engine.zero import ZeroEngine

    kind = ZeroEngine if is_deepspeed(accelerator) else FsdpEngine if is_fsdp() else DdpEngine
    return kind(
        accelerator,
        module,
        train=train,
        micro_batch_size=micro_batch_size,
        before_prepare=before_prepare,
        state=state or TrainState(),
        lr_scales=lr_scales,
    )
