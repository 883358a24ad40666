"""An adapter merged into its base layer by layer: neither model is ever in memory, only the tensor that is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_model import DTYPES, nf4_config, skeleton
from tsqlora_scale.model.base_tensors import NameInModel, StoredTensor, names_in_model, stored_tensors
from tsqlora_scale.model.generation_files import settings_that_load, write_settings
from tsqlora_scale.model.heads import has_head, head_modules
from tsqlora_scale.model.layer_merge import LayerMerger, through_nf4, unpacked
from tsqlora_scale.model.stored_quantization import stored_quantization
from tsqlora_scale.model.tensor_stream import StreamedTensor, write_shards
from tsqlora_scale.model.tied_weights import ties_of
from tsqlora_scale.tasks import auto_class_of, objective_class

#: What bitsandbytes writes beside a packed weight, by the rest of its name.
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
               ".quant_state.bitsandbytes__fp4")  # fmt: skip


class NotLayerByLayer(Exception):
    """A model or an adapter that has to be merged as a whole; the message says why."""


class StreamedMerge:
    """A merge that has been planned from names and shapes alone.

    Raises:
        NotLayerByLayer: one that needs the whole model.
    """

    def __init__(self, adapter: Path, config: Config, path: str, *, model_config: Any, unquantised: list[str]) -> None:
        """
        Args:
            adapter: a whole adapter that fits the model.
            path: of the base, a folder or a hub name.
            model_config: the base's, as the task needs it.
            unquantised: linear layers that a 4-bit base keeps in floating point.
        """
        self._model, self._path = config.model, path
        self._dtype = DTYPES[config.model.dtype]
        self._is_packed = stored_quantization(model_config) is not None
        stored = stored_tensors(path, revision=config.model.revision)
        if stored is None:
            raise NotLayerByLayer("its weights are no safetensors")
        self._stored: dict[str, StoredTensor] = stored
        if getattr(model_config, "auto_map", None):
            raise NotLayerByLayer("it brings code of its own")
        bare: Any = skeleton(auto_class_of(config.task), copy.deepcopy(model_config))
        bare.tie_weights()
        self._bare: Any = bare
        self._merger = LayerMerger(adapter)
        self._names = names_in_model(stored, self._bare)
        self._sources = {placed.model: stored[name] for name, placed in self._names.items() if placed.is_whole}
        self._check(has_head(objective_class(config.task).peft_task_type))
        self._through_nf4 = self._packed_while_loading(unquantised)

    def _check(self, with_head: bool) -> None:
        """See that every tensor of the result is one of the base's, with or without a layer's update, or the
        adapter's.
        """
        own: dict[str, Tensor] = self._bare.state_dict()
        replaced = set(self._merger.replaced)
        upcast = set(getattr(self._bare, "_keep_in_fp32_modules_strict", None) or ())
        if self._dtype == torch.float16:
            upcast |= set(getattr(self._bare, "_keep_in_fp32_modules", None) or ())
        if upcast and self._dtype != torch.float32:
            raise NotLayerByLayer(f"it keeps {min(upcast)} in float32")
        if special := next((name for name in self._merger.shapes if _is_special(name)), None):
            raise NotLayerByLayer(f"{special} is more than two factors")
        if unknown := replaced - own.keys():
            raise NotLayerByLayer(f"{min(unknown)} has another name in it")
        adapted = {f"{layer}.weight" for layer in self._merger.layers}
        if missing := adapted - self._sources.keys():
            raise NotLayerByLayer(f"{min(missing)} is no tensor of its files")
        placed = {name.model for name in self._names.values()} | replaced
        for names in ties_of(self._bare):
            if (adapted | replaced) & set(names) or len(self._sources.keys() & set(names)) != 1:
                raise NotLayerByLayer(f"{names[0]} and {names[1]} are one tensor, which the adapter changes")
            placed |= set(names)
        heads = head_modules(self._bare) if with_head else []
        new = {name for name in own if name.split(".")[0] in heads} - replaced
        if lacking := new | (own.keys() - placed):
            raise NotLayerByLayer(f"{min(lacking)} is drawn anew when it loads")
        for name, source in self._sources.items():
            if name not in replaced and not self._is_packed and source.shape != tuple(own[name].shape):
                raise NotLayerByLayer(f"{name} is {source.shape} in its files")

    def _packed_while_loading(self, unquantised: list[str]) -> set[str]:
        """Weights that the run has packed into 4 bits as it loaded the base, by Transformers' own choice."""
        if self._model.quantization != "nf4" or self._is_packed:
            return set()
        from bitsandbytes.nn.modules import Linear4bit
        from transformers.quantizers.auto import AutoHfQuantizer

        quantiser = AutoHfQuantizer.from_config(nf4_config(self._model, unquantised), pre_quantized=False)
        trial = copy.deepcopy(self._bare)
        quantiser.preprocess_model(model=trial, device_map=None)
        return {f"{name}.weight" for name, module in trial.named_modules() if isinstance(module, Linear4bit)}

    def write(self, out: Path) -> None:
        """Write the model's description and its weights, in as many files as they need.

        Raises:
            OSError: they cannot be written.
            ValueError: a merged weight is not finite.
        """
        write_shards(self._tensors(), out)
        self._describe(out)

    def _tensors(self) -> Iterator[StreamedTensor]:
        """The tensors of the result, in the order of the base's files."""
        replaced = set(self._merger.replaced)
        for name, placed in self._names.items():
            if placed.model not in replaced and not (self._is_packed and name.endswith(_STATISTICS)):
                yield self._tensor(self._stored[name], placed)
        own = self._bare.state_dict()
        for name in sorted(replaced):
            shape = tuple(own[name].shape)
            yield StreamedTensor(name, shape, self._dtype, lambda n=name: self._merger.read(n).to(self._dtype))  # type: ignore[misc]

    def _tensor(self, source: StoredTensor, placed: NameInModel) -> StreamedTensor:
        dtype = self._dtype if source.dtype.is_floating_point else source.dtype
        shape = source.shape
        statistics = self._statistics(source.name)
        if statistics:
            shape, dtype = tuple(self._bare.state_dict()[placed.model].shape), _packed_type(statistics)
        return StreamedTensor(placed.file, shape, dtype, lambda: self._made(source, placed, statistics))

    def _made(self, source: StoredTensor, placed: NameInModel, statistics: Mapping[str, StoredTensor]) -> Tensor:
        """A tensor of the base as the run has computed with it, with the adapter's update."""
        value = source.read()
        if value.is_floating_point():
            value = value.to(self._dtype)
        layer, _, own = placed.model.rpartition(".")
        module = self._bare.get_submodule(layer)
        is_turned = isinstance(module, Conv1D)
        if statistics:
            value = unpacked(value, {end: each.read() for end, each in statistics.items()})
        elif placed.model in self._through_nf4:
            value = through_nf4(value.T if is_turned else value)
        lies_straight = bool(statistics) or placed.model in self._through_nf4
        if placed.is_whole and own == "weight" and layer in self._merger.layers:
            if is_turned and lies_straight:
                module = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
            value = self._merger.merged(layer, module, value)
        return value.T if is_turned and lies_straight else value

    def _statistics(self, name: str) -> dict[str, StoredTensor]:
        """What lies beside a packed weight, by the ends of the names."""
        if not self._is_packed:
            return {}
        found = ((end.removeprefix("."), self._stored.get(name + end)) for end in _STATISTICS)
        return {end: each for end, each in found if each is not None}

    def _describe(self, out: Path) -> None:
        """``config.json`` and ``generation_config.json``, as ``save_pretrained`` of the loaded model writes them."""
        bare, model = self._bare, self._model
        if hasattr(bare.config, "quantization_config"):
            del bare.config.quantization_config
        bare.config.use_cache = True
        bare.config.dtype = str(self._dtype).removeprefix("torch.")
        bare.config.architectures = [type(bare).__name__]
        bare.config.save_pretrained(out)
        if not bare.can_generate():
            return
        from transformers import GenerationConfig

        given = settings_that_load(self._path, model.revision).get("generation_config")
        options: dict[str, Any] = {"revision": model.revision}
        if given is None:
            try:
                given = GenerationConfig.from_pretrained(self._path, **options)
            except OSError:  # it has no file of its own
                options |= {"config_file_name": "config.json", "_from_model_config": True}
                given = GenerationConfig.from_pretrained(self._path, **options)
        given.pad_token_id = bare.config.get_text_config().pad_token_id
        write_settings(given, out)


def _is_special(name: str) -> bool:
    """Whether a tensor of an adapter is none that a layer is merged by here, and no head's."""
    plain = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    return ".base_layer." in name or (".lora_" in name and not name.endswith(plain))


def _packed_type(statistics: Mapping[str, StoredTensor]) -> torch.dtype:
    """The type that a packed weight has when it is unpacked, as its files say."""
    from bitsandbytes.utils import unpack_tensor_to_dict

    state = next(each for end, each in statistics.items() if end.startswith("quant_state"))
    found: torch.dtype = getattr(torch, unpack_tensor_to_dict(state.read())["dtype"])
    return found
