"""Evaluation mode without its side effect: layers that checkpoint their activations go on doing so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluation_mode(module: nn.Module, recomputing: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, nothing is dropped out. On leaving, training modes are as they were, module by module.

    Transformers checkpoints only while a layer is in training mode. Here such a layer says that it is, until it calls
    its checkpointing function; the layer's own computation, the first time and when it is repeated in the backward
    pass, sees evaluation mode everywhere.

    Args:
        recomputing: a context for every repetition of a layer's forward pass inside the backward pass.
    """
    modes = [(part, part.training) for part in module.modules()]
    functions: list[tuple[Any, Callable[..., Any]]] = []
    module.eval()
    try:
        layers: list[Any] = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
        for layer in layers:
            if layer.gradient_checkpointing:
                function = layer._gradient_checkpointing_func
                functions.append((layer, function))
                layer._gradient_checkpointing_func = partial(_checkpointed, layer, function, recomputing)
                layer.training = True
        yield
    finally:
        for layer, function in functions:
            layer._gradient_checkpointing_func = function
        for part, mode in modes:
            part.training = mode


def _checkpointed(
    part: nn.Module,
    checkpoint: Callable[..., Any],
    recomputing: Callable[[], AbstractContextManager[Any]],
    call: Callable[..., Any],
    *args: Any,
) -> Any:
    def evaluate(*inputs: Any) -> Any:
        part.training = False
        try:
            if torch._C._current_graph_task_id() == -1:
                return call(*inputs)
            with recomputing():
                return call(*inputs)
        finally:
            part.training = True

    return checkpoint(evaluate, *args) if torch.is_grad_enabled() else evaluate(*args)
