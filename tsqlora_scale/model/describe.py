"""What can be known of a model without its weights in memory: its description, its tokenizer, its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_folder import check_folder
from tsqlora_scale.model.dropouts import set_dropout
from tsqlora_scale.model.generation_files import check_generation_file
from tsqlora_scale.model.stored_quantization import (
    check_packed,
    check_stored,
    kept_in_floating_point,
    names_in_files,
    stored_quantization,
)
from tsqlora_scale.model.tokenizer import fit_tokenizer, prompt_ids
from tsqlora_scale.model.weight_files import check_base_weights


def load_descriptions(config: Config, path: str) -> tuple[Any, Any]:
    """The model's config and tokenizer, the latter with the task's chat template.

    Raises:
        UserError: when the model cannot be found or described, or the template not be read.
    """
    from transformers import AutoTokenizer

    from tsqlora_scale.tasks.objectives.chat_template import read_template

    model_config, key = describe_model(config, path), f"model.name_or_path={config.model.name_or_path!r}"
    tokenizer = _loaded(config, path, AutoTokenizer)
    if config.task.chat_template is not None:
        tokenizer.chat_template = read_template(config.task.chat_template)
    fit_tokenizer(config, model_config, tokenizer, key=key)
    return model_config, tokenizer


def describe_model(config: Config, path: str) -> Any:
    """The model's config as the task needs it, by its ``config.json`` alone.

    Raises:
        UserError: when the model cannot be found or described.
    """
    from transformers import AutoConfig

    key = f"model.name_or_path={config.model.name_or_path!r}"
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{key}: no such folder")
    if Path(path).is_dir():
        check_folder(Path(path), key=key)
    model_config = _loaded(config, path, AutoConfig)
    check_stored(config.model, model_config, key=key)
    if config.model.dropout is not None:
        set_dropout(model_config, config.model.dropout)
    if config.task.prompt is not None:  # no head is new
        return model_config
    if config.task.num_labels:
        model_config.num_labels = config.task.num_labels  # keeps the checkpoint's names if there are as many
    if config.task.type == "regression":
        model_config.problem_type = "regression"
    elif config.task.type == "classification":
        model_config.problem_type = "single_label_classification"
        if isinstance(config.task.labels, list):
            model_config.id2label = dict(enumerate(config.task.labels))
            model_config.label2id = {name: i for i, name in enumerate(config.task.labels)}
    return model_config


def _loaded(config: Config, path: str, auto_class: Any) -> Any:
    """What an auto class makes of the model's files.

    Raises:
        UserError: nothing.
    """
    key = f"model.name_or_path={config.model.name_or_path!r}"
    options: dict[str, Any] = {
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
    }
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # hub, network, JSON and import errors of several libraries
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{key}: brings code of its own, which runs only with model.trust_remote_code=true; read it first"
            ) from None
        raise UserError(f"{key}: cannot be loaded ({reason}); give a folder with config.json or a hub name") from None


def check_generation(config: Config, path: str, model_config: Any) -> None:
    """The generation settings of a model in a folder, where the task generates.

    Raises:
        UserError: naming their file.
    """
    if config.task.type in ("seq2seq", "causal") and Path(path).is_dir():
        check_generation_file(Path(path), model_config, key=f"model.name_or_path={config.model.name_or_path!r}")


def check_weights(config: Config, path: str) -> None:
    """The files of a model in a folder; those of a hub name are checked as they are loaded.

    Raises:
        UserError: see :func:`tsqlora_scale.model.weight_files.check_base_weights`.
    """
    if Path(path).is_dir():
        key = f"model.name_or_path={config.model.name_or_path!r}"
        check_base_weights(Path(path), key=key)
        check_packed(Path(path), key=key)


def check_adapter_fits(config: Config, model_config: Any, adapter: str | Path) -> None:
    """A saved adapter against the config's model, on the meta device.

    Raises:
        UserError: naming the folder, the file or the tensor.
    """
    from tsqlora_scale.model.adapters.adapter_type import check_saved
    from tsqlora_scale.model.base_model import skeleton
    from tsqlora_scale.tasks import auto_class_of

    if not Path(adapter).is_dir():
        raise UserError(f"--adapter {str(adapter)!r} is no folder; give the adapter folder that a run wrote")
    auto_class = auto_class_of(config.task)
    bare = skeleton(auto_class, model_config, trust_remote_code=config.model.trust_remote_code)
    check_saved(Path(adapter), bare, kind=config.adapter.type)


def check_architecture(config: Config, model_config: Any, tokenizer: Any) -> list[str]:
    """Target modules and lengths against the model's structure, on the meta device.

    Runs before the process group exists: under ZeRO-3, Transformers would shard even a skeleton.

    Returns:
        The linear layers that a 4-bit base keeps in floating point: those outside the repeated blocks and those whose
        weight is read without a call of the layer, or what its files say.
    """
    from tsqlora_scale.model.adapters.adapter_type import own_type
    from tsqlora_scale.model.base_model import can_checkpoint, skeleton
    from tsqlora_scale.model.block_depths import check_depth
    from tsqlora_scale.model.heads import check_language_head
    from tsqlora_scale.model.linear_layers import heads_of, read_past
    from tsqlora_scale.tasks import auto_class_of, check_lengths

    auto_class = auto_class_of(config.task)
    try:
        bare = skeleton(auto_class, model_config, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # whatever a wrong number in config.json leads to
        key = f"model.name_or_path={config.model.name_or_path!r}"
        if "Unrecognized configuration class" in str(error):
            raise UserError(
                f"{key} is a {model_config.model_type} model, which has no {config.task.type} form; "
                "choose another model or task.type"
            ) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{key}: its config.json describes no model that can be built ({reason}); mend it") from None
    path = resolve(config.model.name_or_path, key="model.name_or_path")
    if config.task.prompt is not None and Path(path).is_dir():  # those of a hub name are checked as they are loaded
        check_language_head(bare, names_in_files(path, revision=None), key=config.model.name_or_path)
    if config.model.gradient_checkpointing and not can_checkpoint(bare):
        raise UserError(
            f"model.gradient_checkpointing=true: {type(bare).__name__} keeps its activations in any case; set it to "
            "false, and lower train.micro_batch_size where memory is short"
        )
    _check_attention(config, model_config, auto_class)
    check_depth(config, bare)
    _check_adapter_type(config, bare)
    prompt_ids(config.adapter, tokenizer)
    own = own_type(config.adapter.type)
    check_lengths(config.task, bare, ahead=0 if own is None else own.tokens_ahead(config.adapter))
    if stored_quantization(model_config) is not None:
        kept = kept_in_floating_point(bare, names_in_files(path, revision=config.model.revision))
        if packed := sorted(read_past(bare) - set(kept)):
            raise UserError(
                f"model.name_or_path={config.model.name_or_path!r}: {packed[0]} is 4-bit in its files, and "
                f"{model_config.model_type}'s mixers read that weight as it is; give the model that is not quantised"
            )
        return kept
    return [*heads_of(bare), *sorted(read_past(bare))]


def _check_adapter_type(config: Config, bare: Any) -> None:
    """Raises:
    UserError: what ``adapter.type`` needs is not in the model, or ``adapter.r`` is more than it has.
    """
    from tsqlora_scale.model.adapters.adapter_type import own_type
    from tsqlora_scale.model.block_depths import chosen_blocks
    from tsqlora_scale.model.blocks import hidden_size
    from tsqlora_scale.model.linear_layers import linear_layers, resolve_targets
    from tsqlora_scale.model.tied_weights import ties_of

    adapter = config.adapter
    own = own_type(adapter.type)
    if own is not None:
        own.check(bare)
        if adapter.layers is not None:
            chosen_blocks(bare, adapter.layers)
            if not ADAPTER_TRAITS[adapter.type].wide:
                own.in_blocks(bare, own.chosen(bare, ()), adapter.layers)
        if ADAPTER_TRAITS[adapter.type].wide and adapter.r > hidden_size(bare):
            raise UserError(
                f"adapter.r={adapter.r}: a bottleneck of adapter.type={adapter.type!r} is narrower than what it stands "
                f"behind, {hidden_size(bare)}; lower it"
            )
        return
    layers: dict[str, Any] = linear_layers(bare)
    targets = resolve_targets(bare, adapter.target_modules, layers=adapter.layers)
    widest = max(min(layers[name].weight.shape) for name in targets)
    if adapter.r > widest:
        raise UserError(
            f"adapter.r={adapter.r}: no layer that is adapted has a rank above {widest}; lower it, "
            "or choose other adapter.target_modules"
        )
    narrowest = min(targets, key=lambda name: min(layers[name].weight.shape))
    if adapter.starts_in_base and adapter.r > min(layers[narrowest].weight.shape):
        raise UserError(
            f"adapter.r={adapter.r}: adapter.init={adapter.init!r} takes as many parts out of the weight of every "
            f"layer, and {narrowest} has {min(layers[narrowest].weight.shape)}; lower it, or leave such layers out of "
            "adapter.target_modules"
        )
    tied = {name for names in ties_of(bare) for name in names}
    shared = [name for name in targets if f"{name}.weight" in tied]
    if adapter.starts_in_base and shared:
        raise UserError(
            f"adapter.init={adapter.init!r}: takes factors out of the weight of {shared[0]}, which other layers share; "
            "leave it out of adapter.target_modules"
        )
    if adapter.type == "loratrf" and (adapter.filter_rank or 0) > hidden_size(bare):
        raise UserError(
            f"adapter.filter_rank={adapter.filter_rank}: no T has a rank above {hidden_size(bare)}; lower it"
        )


def _check_attention(config: Config, model_config: Any, auto_class: Any) -> None:
    """Raises:
    UserError: the model has no attention of the kind that is asked for, or a package for it is missing.
    """
    from tsqlora_scale.model.base_model import skeleton

    wanted, trust = config.model.attention, config.model.trust_remote_code
    if wanted == "auto":
        return
    try:
        skeleton(auto_class, copy.deepcopy(model_config), trust_remote_code=trust, attn_implementation=wanted)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.attention={wanted!r}: this model cannot compute so here ({reason}); choose another, or auto"
        ) from None
