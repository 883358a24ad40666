"""The seam between a run and what it trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.dora import DoraAdapter
from tsqlora_scale.model.adapters.lora import LoraAdapter
from tsqlora_scale.model.adapters.rslora import RsLoraAdapter
from tsqlora_scale.model.adapters.svd import SvdAdapter


class AdapterType(Protocol):
    """One kind of adapter: how it is put on a base, what of it is scored, how it is saved and read.

    Whether it may be scored and resized at all is said by :data:`~tsqlora_scale.config.model_section.ADAPTER_TRAITS`,
    which the config is checked by.
    """

    name: str

    def build(
        self,
        base: nn.Module,
        adapter: AdapterConfig,
        *,
        task_type: str,
        new_modules: list[str],
        dtype: str,
        generator: torch.Generator,
        unreached: Collection[str] = (),
    ) -> Any:
        """A PEFT model around ``base``, its trained parameters float32.

        Args:
            unreached: linear layers that nothing trained may sit in: they get no gradient.
        """
        ...

    def untrained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Values by name that are no trained parameters and belong into the file. With ZeRO-3 a collective."""
        ...

    def theta(self, module: nn.Module, *, include_head: bool = False) -> dict[str, nn.Linear]:
        """The linear modules whose parameters are scored, by name, sorted."""
        ...

    def save(
        self,
        model: nn.Module,
        values: Mapping[str, torch.Tensor],
        folder: Path,
        *,
        base_name: str,
        revision: str | None = None,
    ) -> None:
        """Write an adapter that PEFT opens. On one process."""
        ...

    def describe(
        self, model: nn.Module, values: Mapping[str, torch.Tensor], *, base_name: str, revision: str | None = None
    ) -> dict[str, Any]:
        """JSON values by which :func:`~.adapter_files.write_adapter` writes what :meth:`save` does, later."""
        ...

    def load(self, base: nn.Module, folder: Path, *, dtype: str) -> Any:
        """Put a saved adapter on a fresh base.

        Raises:
            UserError: no adapter there, or one in an unsafe format.
        """
        ...

    def read(
        self, model: nn.Module, folder: Path, *, whole: bool = True
    ) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """Ranks by layer and values by parameter name of a saved adapter, for a model with a fresh one.

        Args:
            whole: whether what is trained beside the layers, a head, must be there, too.

        Raises:
            UserError: no adapter there, or one that does not fit.
        """
        ...


ADAPTER_TYPES: dict[str, AdapterType] = {
    a.name: a for a in (LoraAdapter(), RsLoraAdapter(), DoraAdapter(), SvdAdapter())
}


def adapter_type(name: str) -> AdapterType:
    """The implementation of ``adapter.type``."""
    return ADAPTER_TYPES[name]
