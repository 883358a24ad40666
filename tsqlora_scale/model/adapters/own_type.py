"""What the types have in common that are not PEFT's: some parameters of the base train, or modules put into it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.engine.sharded import whole_shape, write_parameter
from tsqlora_scale.model.adapters.adapter_files import write_adapter
from tsqlora_scale.model.adapters.placed_model import PlacedModel, in_whole_module, make_float32
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.base_model import use_autocast
from tsqlora_scale.model.block_depths import block_of, chosen_blocks
from tsqlora_scale.model.heads import has_head, head_modules
from tsqlora_scale.model.linear_layers import is_idle, linear_layers
from tsqlora_scale.model.weight_files import PREFIX, WEIGHTS, check_own


class OwnAdapter(ABC):
    """An :class:`~.adapter_type.AdapterType` whose file holds what trains, each under the name that it has.

    ``adapter_config.json`` says by ``peft_type`` which type it is, so that PEFT refuses it, and names the parameters.
    """

    name: str
    #: The key of the config that says how wide the type's modules are.
    width_key = "r"

    @abstractmethod
    def place(self, base: nn.Module, r: int, generator: torch.Generator) -> None:
        """Put the type's modules, if it has any, into ``base``, with values from ``generator`` in the order of names.

        Raises:
            UserError: they do not fit such a model.
        """

    @abstractmethod
    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """Names of the parameters of a base, with its modules in place, that train; heads aside.

        Args:
            unreached: layers and parameters that the logits do not depend on.
        """

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Whether the type fits a base, of which only the structure need be there.

        Raises:
            UserError: saying why it does not.
        """

    def build(self, base: nn.Module, placement: Placement) -> PlacedModel:
        """See :class:`~.adapter_type.AdapterType`."""
        self.check(base)
        kept = head_modules(base) if has_head(placement.task_type) and not placement.adapter.train_head else []
        layers, unreached = linear_layers(base), placement.unreached
        whole = [
            module for module in placement.new_modules if not is_idle(module, layers, unreached) and module not in kept
        ]
        self.put(base, placement)
        base.requires_grad_(False)
        model = self.wrapped(base, whole)
        idle = [name for name in placement.new_modules if name not in whole]
        chosen = {name for name in self.chosen(base, unreached) if not _inside(name, idle)}
        if placement.adapter.layers is not None:
            chosen = self.in_blocks(base, chosen, placement.adapter.layers)
        for name, param in base.named_parameters():
            if name in chosen or in_whole_module(name, whole):
                param.requires_grad_(True)
        make_float32(model)
        model.train(base.training)
        use_autocast(model, placement.dtype, fp16=True)
        return model

    def in_blocks(self, base: nn.Module, names: Collection[str], layers: list[int] | str) -> set[str]:
        """Those of some parameters that lie in the blocks of ``adapter.layers``.

        Raises:
            UserError: there are no such blocks, or nothing to train in one of them.
        """
        blocks = chosen_blocks(base, layers)
        empty = sorted(blocks - {block_of(name) for name in names})
        if empty:
            raise UserError(
                f"adapter.layers={layers!r}: {empty[0]} has nothing that adapter.type={self.name!r} trains; "
                "leave it out"
            )
        return {name for name in names if block_of(name) in blocks}

    def put(self, base: nn.Module, placement: Placement) -> None:
        """:meth:`place` for a run's start."""
        self.place(base, getattr(placement.adapter, self.width_key), placement.generator)

    def put_saved(self, base: Any, description: Mapping[str, Any]) -> None:
        """:meth:`place` for an adapter of which :func:`~tsqlora_scale.model.weight_files.check_own` tells this; of
        ``base`` only the structure need be there."""
        self.place(base, description["r"] or 0, torch.Generator())

    def wrapped(self, base: nn.Module, whole_modules: Iterable[str]) -> PlacedModel:
        """A base that has the type's modules in it, under PEFT's names."""
        return PlacedModel(base, whole_modules)

    def tokens_ahead(self, adapter: AdapterConfig) -> int:
        """How many of a model's positions the type takes from a text."""
        return 0

    def untrained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Nothing: what does not train is as the base's own file has it."""
        return {}

    def heads(self, model: nn.Module) -> set[str]:
        """See :class:`~.adapter_type.AdapterType`."""
        assert isinstance(model, PlacedModel)
        trained = (name for name, param in model.named_parameters() if param.requires_grad)
        return {name for name in trained if in_whole_module(name, model.whole_modules)}

    def theta(self, module: nn.Module, *, include_head: bool = False) -> dict[str, nn.Linear]:
        """None: what trains is more than linear modules."""
        raise AssertionError(f"{self.name} is not scored")

    def save(
        self,
        model: nn.Module,
        values: Mapping[str, torch.Tensor],
        folder: Path,
        *,
        base_name: str,
        revision: str | None = None,
    ) -> None:
        """Write what trains. On one process."""
        description = self.describe(model, values, base_name=base_name, revision=revision)
        write_adapter(folder, description, values)

    def describe(
        self, model: nn.Module, values: Mapping[str, torch.Tensor], *, base_name: str, revision: str | None = None
    ) -> dict[str, Any]:
        """See :class:`~.adapter_type.AdapterType`."""
        assert isinstance(model, PlacedModel)
        config = {
            "peft_type": self.name.upper(),
            "base_model_name_or_path": base_name,
            "revision": revision,
            "r": self.width(model.get_base_model()),
            "whole_modules": model.whole_modules,
            "parameters": sorted(values),
        }
        return {"config": json.loads(json.dumps(config)), "keys": {name: name for name in sorted(values)}}

    def width(self, base: nn.Module) -> int | None:
        """Width of the modules in place; None for a type without."""
        return None

    def load(self, base: nn.Module, folder: Path, *, dtype: str) -> PlacedModel:
        """See :class:`~.adapter_type.AdapterType`."""
        description = check_own(folder, self.name)
        self.put_saved(base, description)
        model = self.wrapped(base, description["whole_modules"])
        tensors = load_file(folder / WEIGHTS)
        params = dict(model.named_parameters())
        missing = sorted(tensors.keys() - params.keys())
        if missing:
            raise UserError(f"adapter {str(folder)!r}: the model has no {missing[0].removeprefix(PREFIX)}")
        base.requires_grad_(False)
        for name in tensors:
            params[name].requires_grad_(True)
        make_float32(model)
        params = dict(model.named_parameters())
        for name, value in sorted(tensors.items()):
            if value.shape != (shape := whole_shape(params[name])):
                raise UserError(
                    f"adapter {str(folder)!r}: {name.removeprefix(PREFIX)} is {tuple(value.shape)}, the model's is "
                    f"{tuple(shape)}; give the base that it was trained on, with as many labels"
                )
            write_parameter(params[name], value)
        base.requires_grad_(False)
        use_autocast(model, dtype, fp16=True)
        return model

    def read(
        self, model: nn.Module, folder: Path, *, whole: bool = True
    ) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """See :class:`~.adapter_type.AdapterType`; there are no ranks."""
        check_own(folder, self.name)
        tensors, heads = load_file(folder / WEIGHTS), self.heads(model)
        values = {}
        for name, param in model.named_parameters():
            if not param.requires_grad or (name not in tensors and name in heads and not whole):
                continue
            if name not in tensors:
                raise UserError(f"adapter {str(folder)!r} has no {name}; give the config that it was trained with")
            values[name] = tensors[name].float()
        return {}, values

    def check_fits(self, folder: Path, bare: nn.Module, *, heads: bool = True) -> None:
        """A saved adapter against a model's structure, on the meta device.

        Args:
            heads: whether modules that train whole must fit, too.

        Raises:
            UserError: naming the parameter.
        """
        description = check_own(folder, self.name)
        self.check(bare)
        self.put_saved(bare, description)
        own = {f"{PREFIX}{name}": tuple(param.shape) for name, param in bare.named_parameters()}
        for name, shape in description["shapes"].items():
            if not heads and in_whole_module(name, description["whole_modules"]):
                continue
            if own.get(name) != shape:
                has = f"the model's is {own[name]}" if name in own else "the model has none"
                inner = name.removeprefix(PREFIX)
                raise UserError(
                    f"adapter {str(folder)!r}: {inner} is {shape}, {has}; give the config, with the base model, that "
                    "it was trained with"
                )

    def check_width(self, folder: Path, adapter: AdapterConfig) -> None:
        """Raises:
        UserError: the modules of a saved adapter are of another width than the config's.
        """
        r, key = check_own(folder, self.name)["r"], self.width_key
        if r is not None and r != getattr(adapter, key):
            raise UserError(
                f"adapter {str(folder)!r}: is of width {r}, adapter.{key} is {getattr(adapter, key)}; set "
                f"adapter.{key}={r}"
            )

    def merged(self, base: nn.Module, folder: Path) -> Any:
        """A fresh base with a saved adapter's values in it; for types whose merge is exact. All of it is float32, as
        what trained was.
        """
        return self.load(base, folder, dtype="fp32").get_base_model().float()


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
