"""The seam between a run and what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.bitfit import BitFitAdapter
from tsqlora_scale.model.adapters.bottleneck import HoulsbyAdapter, PfeifferAdapter
from tsqlora_scale.model.adapters.dora import DoraAdapter
from tsqlora_scale.model.adapters.full_tuning import FullTuning
from tsqlora_scale.model.adapters.lora import LoraAdapter, check_magnitudes
from tsqlora_scale.model.adapters.loratrf import LoraTrfAdapter, check_filter_rank, check_filters
from tsqlora_scale.model.adapters.own_type import OwnAdapter
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.prefix_tuning import PrefixTuning
from tsqlora_scale.model.adapters.prompt_tuning import PromptTuning
from tsqlora_scale.model.adapters.rslora import RsLoraAdapter
from tsqlora_scale.model.adapters.svd import SvdAdapter
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.model.weight_files import DESCRIPTION, check_fits, kind_of, read_json, require_adapter


class AdapterType(Protocol):
    """One kind of adapter: how it is put on a base, what of it is scored, how it is saved and read.

    Whether it may be scored and resized at all is said by :data:`~tsqlora_scale.config.model_section.ADAPTER_TRAITS`,
    which the config is checked by.
    """

    name: str

    def build(self, base: nn.Module, placement: Placement) -> Any:
        """A PEFT model around ``base``, or what has its names, the trained parameters float32."""
        ...

    def untrained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Values by name that are no trained parameters and belong into the file. With ZeRO-3 a collective."""
        ...

    def heads(self, model: nn.Module) -> set[str]:
        """Names of the parameters that train in modules which train whole: of another task they are of no use."""
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
        """Write an adapter: where the type is PEFT's, one that PEFT opens. On one process."""
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
    a.name: a
    for a in (
        LoraAdapter(),
        RsLoraAdapter(),
        DoraAdapter(),
        SvdAdapter(),
        LoraTrfAdapter(),
        BitFitAdapter(),
        HoulsbyAdapter(),
        PfeifferAdapter(),
        PromptTuning(),
        PrefixTuning(),
        FullTuning(),
    )
}


def adapter_type(name: str) -> AdapterType:
    """The implementation of ``adapter.type``."""
    return ADAPTER_TYPES[name]


def check_saved(folder: Path, bare: nn.Module, *, kind: str) -> None:
    """Check that a saved adapter is whole, of a type, and one of this model, tensor by tensor.

    Args:
        bare: the base's structure, on the meta device; not to be used again.
        kind: ``adapter.type``.

    Raises:
        UserError: naming the folder, the file or the tensor.
    """
    require_adapter(folder)
    check_kind(folder, kind)
    own = own_type(kind)
    if own is not None:
        own.check_fits(folder, bare)
        return
    check_fits(folder, bare)
    if kind == "loratrf":
        check_filters(folder, bare)


def check_sizes(folder: Path, adapter: AdapterConfig) -> None:
    """Check that a saved adapter that is to go on has the sizes of the config's, ranks of layers aside, and DoRA's
    magnitudes where that has them.

    Raises:
        UserError: naming the key.
    """
    own = own_type(adapter.type)
    if own is not None:
        own.check_width(folder, adapter)
        return
    check_magnitudes(folder, adapter.type)
    if adapter.type == "loratrf":
        check_filter_rank(folder, adapter)


def saved_kind(folder: Path) -> str:
    """The ``adapter.type`` of a saved adapter.

    Raises:
        UserError: there is none, or of a type that is not known.
    """
    require_adapter(folder)
    kind = kind_of(read_json(folder / DESCRIPTION))
    if kind not in ADAPTER_TYPES:
        raise UserError(
            f"{folder / DESCRIPTION}: peft_type is {kind.upper()!r}; only {', '.join(ADAPTER_TYPES)} are read"
        )
    return kind


def load_adapter(base: nn.Module, folder: str | Path, *, dtype: str | None = None) -> Any:
    """Put a saved adapter of any type on a fresh base model of Transformers, for evaluation.

    Args:
        base: as ``from_pretrained`` gives it, with as many labels as the adapter was trained for.
        folder: of the adapter, as a run writes it.
        dtype: ``bf16`` or ``fp16``: the forward pass runs under autocast, as in a run of that ``model.dtype``; None: as
            the base's own type asks for.

    Raises:
        UserError: no adapter there, or one that does not fit.
    """
    place = Path(folder)
    if dtype is None:
        kinds = {param.dtype for param in base.parameters()}
        dtype = next((name for name, kind in DTYPES.items() if name != "fp32" and kind in kinds), "fp32")
    return adapter_type(saved_kind(place)).load(base, place, dtype=dtype).eval()


def check_kind(folder: Path, kind: str) -> None:
    """Variants of LoRA are told apart by whoever cares (:func:`check_sizes` of those that go on).

    Raises:
        UserError: a saved adapter is of a type that another one's code cannot open.
    """
    alike = {"lora", "rslora", "dora", "svd"}  # whose file is a LoRA adapter's
    found = kind_of(read_json(folder / DESCRIPTION))
    if found in ADAPTER_TYPES and found != kind and not {found, kind} <= alike:
        raise UserError(
            f"adapter {str(folder)!r}: is of adapter.type={found!r}, the config's is {kind!r}; give the config that it "
            "was trained with"
        )


def own_type(name: str) -> OwnAdapter | None:
    """The implementation of a type that has no linear layers of PEFT's; None for the others."""
    found = ADAPTER_TYPES[name]
    return found if isinstance(found, OwnAdapter) else None
