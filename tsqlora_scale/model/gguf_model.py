"""A merged model as one GGUF file, for llama.cpp and what is built on it.

Names come from the ``gguf`` package's own tables. The order of rows in q and k, the factors of Llama 3's rotary
frequencies and the keys of the header follow llama.cpp's converter.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_tensors import StoredTensor, stored_tensors
from tsqlora_scale.model.describe import load_descriptions
from tsqlora_scale.model.gguf_vocabulary import add_vocabulary, vocabulary_of

#: Transformers' model type -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: Rotary scalings that a header can say.
_SCALINGS = ("default", "linear", "yarn", "llama3")
#: Values of a Q8_0 block, which rows are divided into.
_BLOCK = 32


def check_gguf(config: Config) -> None:
    """See that a config's model can become a GGUF file, by its descriptions alone.

    Raises:
        UserError: the package is missing, or the model or its tokenizer is none that is served.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf needs the gguf package; pip install 'tsqlora-scale[gguf]'")
    key = f"model.name_or_path={config.model.name_or_path!r}"
    model_config, tokenizer = load_descriptions(config, resolve(config.model.name_or_path, key="model.name_or_path"))
    if config.task.type != "causal" or model_config.model_type not in ARCHITECTURES:
        what = f"a {model_config.model_type} model for {config.task.type}"
        raise UserError(
            f"--format gguf: {key} is {what}; served are causal models of the types {', '.join(ARCHITECTURES)}; "
            "export it as merged"
        )
    scaling = _rope(model_config).get("rope_type", "default")
    if scaling not in _SCALINGS:
        raise UserError(f"--format gguf: {key}: rotary scaling {scaling!r} is none of {', '.join(_SCALINGS)}")
    vocabulary_of(tokenizer, model_config.vocab_size, key=key)


def write_gguf(folder: Path, path: Path, config: Config, *, gguf_type: str) -> list[str]:
    """Write a GGUF file, holding one tensor in memory at a time.

    Args:
        folder: of a merged model that :func:`check_gguf` has let through.
        path: the file to write.
        config: of the run, whose name the model bears.
        gguf_type: of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. Vectors are float32.

    Raises:
        UserError: a weight that its type cannot hold.
        OSError: the file cannot be written.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    trust = config.model.trust_remote_code
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    architecture = ARCHITECTURES[model_config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(config.run.name)
    _add_sizes(writer, model_config)
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    file_type = "ALL_F32" if gguf_type == "f32" else f"MOSTLY_{gguf_type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = vocabulary_of(tokenizer, model_config.vocab_size, key=f"--format gguf: {str(folder)!r}")
    add_vocabulary(writer, vocabulary, folder)
    stored = stored_tensors(str(folder), revision=None)
    assert stored is not None
    _add_tensors(writer, stored, model_config, architecture, kind)
    writer.close()
    notes = [f"{path.name}: matrices in {gguf_type}, vectors in f32; for llama.cpp and what is built on it"]
    if window := _window(model_config):
        notes.append(f"the model's sliding window of {window} tokens is not part of it: longer texts are seen whole")
    return notes


def _add_sizes(writer: Any, model_config: Any) -> None:
    """The header's numbers."""
    import gguf

    rope, width = _rope(model_config), _head_width(model_config)
    writer.add_vocab_size(model_config.vocab_size)
    writer.add_context_length(model_config.max_position_embeddings)
    writer.add_embedding_length(model_config.hidden_size)
    writer.add_block_count(model_config.num_hidden_layers)
    writer.add_feed_forward_length(model_config.intermediate_size)
    writer.add_head_count(model_config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(model_config))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(model_config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(width)
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tensors(writer: Any, stored: dict[str, StoredTensor], model_config: Any, architecture: str, kind: Any) -> None:
    """All tensors: their places first, then one after another their values."""
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model_config.num_hidden_layers)
    is_tied = bool(getattr(model_config, "tie_word_embeddings", False))
    stored = {name: each for name, each in stored.items() if not (is_tied and name == "lm_head.weight")}
    placed = {}
    for name, tensor in stored.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"--format gguf: llama.cpp's {architecture} has no place for {name}; export it as merged")
        placed[found] = tensor
    factors = _rope_factors(model_config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    kinds = {}
    for name, tensor in placed.items():
        kinds[name] = _kind_of(tensor.shape, kind)
        shape, dtype = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name]), np.dtype(np.uint8)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in placed.items():
        values = _in_order(tensor, model_config, architecture)
        packed = gguf.quantize(values, kinds[name])
        if kinds[name] == gguf.GGMLQuantizationType.F16 and not np.isfinite(packed).all():
            raise UserError(f"--format gguf: {tensor.name} has values beyond f16's; give --gguf-type bf16 or f32")
        writer.write_tensor_data(packed.view(np.uint8))


def _kind_of(shape: tuple[int, ...], kind: Any) -> Any:
    """A tensor's type: vectors are float32, rows that are no whole number of blocks f16."""
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return kind


def _in_order(tensor: StoredTensor, model_config: Any, architecture: str) -> np.ndarray:
    """A tensor's values, float32, in llama.cpp's order.

    Its llama turns pairs of neighbours, Transformers' halves of a head: rows of q and k change places.
    """
    values = np.ascontiguousarray(tensor.read().float().numpy())
    heads = {"q_proj": model_config.num_attention_heads, "k_proj": _kv_heads(model_config)}
    module = tensor.name.split(".")[-2]
    if architecture != "llama" or module not in heads:
        return values
    count = heads[module]
    halves = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _rope_factors(model_config: Any) -> np.ndarray | None:
    """What Llama 3 divides its rotary frequencies by, (head width / 2,) float32; None of others."""
    rope = _rope(model_config)
    if rope.get("rope_type") != "llama3":
        return None
    width = _head_width(model_config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    before = rope["original_max_position_embeddings"]
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    smooth = np.clip((before / lengths - low) / (high - low), 0, 1)
    factors: np.ndarray = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _rope(model_config: Any) -> dict[str, Any]:
    """The rotary embedding's settings."""
    found: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    return found


def _head_width(model_config: Any) -> int:
    own = getattr(model_config, "head_dim", None)
    return int(own or model_config.hidden_size // model_config.num_attention_heads)


def _kv_heads(model_config: Any) -> int:
    return int(getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads)


def _window(model_config: Any) -> int | None:
    """Tokens that a layer looks back at most, where there is a limit that matters."""
    window = getattr(model_config, "sliding_window", None)
    if not getattr(model_config, "use_sliding_window", True) or window is None:
        return None
    return int(window) if window < model_config.max_position_embeddings else None
