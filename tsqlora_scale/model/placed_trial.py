"""A type that changes what a model's forward takes, tried on a copy of the model before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.own_type import OwnAdapter
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.probe import PaddedRows, random_copy, reads_pads


def fault_of(
    own: OwnAdapter,
    adapter: AdapterConfig,
    auto_class: Any,
    model_config: Any,
    inputs: Mapping[str, Tensor],
    *,
    unreached: Collection[str] = (),
    padded: PaddedRows | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> str | None:
    """Why a type does not do with a model what it is to do; None where it does.

    The logits must be of as many places as ever and depend on everything that trains, and a row's must not depend on
    the padding beside it.

    Args:
        inputs: of a batch of one, as the model is trained on them.
        unreached: layers that the logits do not depend on without it either.
        padded: rows to ask by whether padding is read; none where the model reads it anyway.
        options: more of ``from_config``.

    Raises:
        UserError: the type's own check of the model.
    """
    with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model, mode = random_copy(auto_class, model_config, trust_remote_code, **options)
        placement = Placement(
            adapter, task_type=None, new_modules=[], dtype="fp32", generator=torch.Generator(), unreached=unreached
        )
        with mode:
            shape = model.eval()(**inputs).logits.shape
            try:
                placed = own.build(model, placement).eval()
                logits = placed(**inputs).logits
                mixed = (logits.float() * torch.randn(logits.shape)).sum()
                trained = {name: param for name, param in placed.named_parameters() if param.requires_grad}
                found = torch.autograd.grad(mixed, list(trained.values()), allow_unused=True)
                changes = padded is not None and reads_pads(placed, padded)
            except UserError:
                raise
            except Exception as error:  # of whatever a model's code does
                return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if logits.shape != shape:
        return f"logits of {tuple(logits.shape)} in the place of {tuple(shape)}"
    idle = [name for name, gradient in zip(trained, found, strict=True) if gradient is None]
    # in the graph, and multiplied by zero
    if not any(gradient is not None and bool(gradient.any()) for gradient in found):
        idle = list(trained)
    if idle:
        return f"no logit depends on {idle[0].removeprefix('base_model.model.')}"
    return "what it makes of a row depends on the padding beside it then" if changes else None
