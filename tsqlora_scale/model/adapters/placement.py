"""What a fresh adapter is put on a base with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from tsqlora_scale.config.schema import AdapterConfig


@dataclass(frozen=True)
class Placement:
    """All that :meth:`~.adapter_type.AdapterType.build` needs beside the base.

    Attributes:
        adapter: the config's section.
        task_type: PEFT's name of the task; None for one that it has no name for.
        new_modules: of the base, that train whole: a head, and what holds newly initialised parameters.
        dtype: ``model.dtype``; factors and heads are float32 in any case.
        generator: of everything that is drawn.
        unreached: linear layers that nothing trained may sit in, and parameters: they get no gradient.
        prompt_ids: tokens that ``adapter.type: prompt`` starts from; none: drawn ones.
    """

    adapter: AdapterConfig
    task_type: str | None
    new_modules: list[str]
    dtype: str
    generator: torch.Generator
    unreached: Collection[str] = ()
    prompt_ids: Sequence[int] = ()
