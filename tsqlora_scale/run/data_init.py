"""``adapter.init: eva``: the pass over some of the pool's samples that LoRA's factors start from."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tsqlora_scale.common.random_streams import generator_for, philox
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapters.data_start import LeadingInputs, start_in_inputs
from tsqlora_scale.model.adapters.lora import ADAPTER, lora_layers
from tsqlora_scale.tasks import Task


def start_from_samples(model: nn.Module, config: Config, task: Task, *, device: torch.device) -> None:
    """Let A of every adapted layer start as the leading directions of its inputs on ``adapter.init_samples`` samples.

    They are drawn evenly, and go through the model one at a time, in evaluation mode: every rank takes the same and
    finds the same, and no token is padding.

    Args:
        model: with a fresh adapter, not yet an engine's; moves to ``device``.
    """
    seed = config.run.seed
    count = min(config.adapter.init_samples, len(task))
    rows = np.sort(philox(seed, "init samples").choice(len(task), count, replace=False))
    layers = lora_layers(model)
    training = [(part, part.training) for part in model.modules()]
    model.to(device).eval()

    def one_pass() -> None:
        # a head trains in float32: the engine, which casts for it, is not there yet
        with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=config.model.dtype == "fp16"):
            for row in rows.tolist():
                model(**task.batch([row]).to(device).inputs)

    found = LeadingInputs(layers, config.adapter.r, generator_for(seed, "init directions")).find(one_pass)
    start_in_inputs(layers, ADAPTER, found)
    for part, mode in training:
        part.training = mode
