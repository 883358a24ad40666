"""A trained adapter in the forms that others want: as it is, with one rank everywhere, or merged into its base."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapted_base import AdaptedBase
from tsqlora_scale.model.adapters.adapter_type import own_type, saved_kind
from tsqlora_scale.model.generation_files import add_settings, save_model
from tsqlora_scale.model.linear_layers import transpose_again, transposed_layers
from tsqlora_scale.model.model_card import result_beside, write_card
from tsqlora_scale.model.padded_adapter import check_for_vllm, copy_adapter, write_for_vllm, write_padded
from tsqlora_scale.model.stored_quantization import dequantised
from tsqlora_scale.model.streamed_merge import NotLayerByLayer, StreamedMerge
from tsqlora_scale.model.tensor_stream import SHARD_BYTES
from tsqlora_scale.model.tied_weights import is_untied, save_untied, ties_of, untie_adapted
from tsqlora_scale.model.weight_files import DESCRIPTION, check_adapter, check_own
from tsqlora_scale.tasks.objectives.answer_settings import answer_settings
from tsqlora_scale.tasks.objectives.languages import set_languages

FORMATS = ("peft", "padded", "vllm", "merged", "gguf")
GgufType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_TYPES = get_args(GgufType)


def export(
    adapter: Path,
    form: str,
    out: Path,
    *,
    config: Config | None,
    overwrite: bool = False,
    gguf_type: GgufType = "f16",
) -> list[str]:
    """Write ``adapter`` to the folder ``out``, whole or not at all.

    Args:
        adapter: the folder that a run wrote.
        form: one of :data:`FORMATS`.
        config: of the run; needed by those that load the base, merged and gguf.
        gguf_type: of the matrices in a GGUF file.

    Returns:
        What is worth saying about it, line by line.

    Raises:
        UserError: no adapter there, no config to merge by, something at ``out`` already, or a form that cannot hold it.
    """
    kind = check_form(adapter, form)
    check_out(out, adapter, overwrite=overwrite)
    if form in ("merged", "gguf") and config is None:
        raise UserError(f"--format {form} loads the base, and needs --config FILE: the run's config.yaml")
    if form == "vllm":
        check_for_vllm(adapter)
    with written_folder(out) as partial:
        if form in ("merged", "gguf"):
            assert config is not None
            return _with_base(adapter, partial, config, gguf_type if form == "gguf" else None)
        write = {"peft": copy_adapter, "padded": write_padded, "vllm": write_for_vllm}[form]
        notes = write(adapter, partial)
    if ADAPTER_TRAITS[kind].own:
        return [f"tsqlora_scale.load_adapter(base, folder) opens it; PEFT has no adapter of type {kind}"]
    return notes


def check_form(adapter: Path, form: str) -> str:
    """The type of a whole adapter that a form can hold.

    Raises:
        UserError: no adapter, or the form is not for its type.
    """
    kind = saved_kind(adapter)
    traits = ADAPTER_TRAITS[kind]
    if own_type(kind) is None:
        check_adapter(adapter)
    else:
        check_own(adapter, kind)
    if form in ("padded", "vllm") and (traits.own or traits.unmerged):
        raise UserError(
            f"--format {form}: is for ranks of plain LoRA layers, the adapter is of type {kind}; choose peft"
        )
    if form in ("merged", "gguf") and traits.unmerged:
        raise UserError(f"--format {form}: an adapter of type {kind} has no merge: {traits.unmerged}")
    return kind


def check_out(out: Path, adapter: Path, *, overwrite: bool, what: str = "the adapter") -> None:
    """See that a folder may be written to.

    Args:
        adapter: what is read: its folder, that of its run or a checkpoint; or another folder.
        what: what that is.

    Raises:
        UserError: that or this process is in it, or it is there and may not be replaced.
    """
    whole = out.resolve()
    if whole == adapter.resolve():
        raise UserError(f"--out {str(out)!r} is {what} itself; choose another folder")
    for name, place in ((what, adapter.resolve()), ("the current folder", Path.cwd())):
        if place.is_relative_to(whole):
            raise UserError(f"--out {str(out)!r} would replace {name}, which is in it; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {str(out)!r} is a file or a link; name a folder")
    if out.is_dir() and overwrite and any(out.iterdir()) and not any(map(_is_of_an_export, out.iterdir())):
        raise UserError(f"--out {str(out)!r} holds no export that --overwrite could replace; choose another folder")
    if out.exists() and not overwrite:
        raise UserError(f"--out {str(out)!r} exists; choose another folder, or give --overwrite")


def _is_of_an_export(path: Path) -> bool:
    """Whether a file is one that every export has: an adapter's, a model's, a GGUF file, the table of cuts."""
    return path.name in (DESCRIPTION, "config.json", "truncations.json") or path.suffix == ".gguf"


@contextmanager
def written_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of ``out`` when everything has been written.

    Raises:
        UserError: it cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_base(adapter: Path, out: Path, config: Config, gguf_type: GgufType | None) -> list[str]:
    """The forms that hold the base, too: a folder of Transformers, or a GGUF file, for which such a folder is made."""
    file = None
    if gguf_type is not None:
        from tsqlora_scale.model.gguf_model import check_gguf, write_gguf

        check_gguf(config)
    base = described(adapter, config)
    if gguf_type is None:
        notes = [*merge(adapter, out, base), "a plain Transformers model: from_pretrained opens it, without PEFT"]
    else:
        whole = out / "merged"
        whole.mkdir()
        notes = merge(adapter, whole, base)
        file = f"model-{gguf_type}.gguf"
        notes += write_gguf(whole, out / file, config, gguf_type=gguf_type)
        shutil.rmtree(whole)
    config = config.with_task(prompt_base=base.config.task.prompt_base)
    write_card(out, config, result_beside(adapter), merged=True, gguf_file=file)
    return notes


def described(adapter: Path, config: Config) -> AdaptedBase:
    """The base without what is for training alone, and would get into the file."""
    as_it_was = config.model.model_copy(update={"dropout": None, "gradient_checkpointing": False})
    return AdaptedBase.checked(config.model_copy(update={"model": as_it_was}), adapter)


def merge(adapter: Path, out: Path, base: AdaptedBase) -> list[str]:
    """Write a plain Transformers model. A 4-bit base is dequantised, to the values that the adapter was trained on.

    Layer by layer where the base's files allow it, so that models larger than memory are merged, too; otherwise in
    memory, with the reason among the notes.

    Args:
        out: an empty folder.

    Raises:
        UserError: the adapter is not one of the base's.
    """
    config, notes = base.config, []
    if config.model.quantization != "none":
        notes.append(f"the base was dequantised to {config.model.dtype}; the file is as large as that, not 4-bit")
    try:
        try:
            if own_type(saved_kind(adapter)) is not None:
                raise NotLayerByLayer("more than linear layers was trained")
            StreamedMerge(
                adapter, base.config, base.path, model_config=base.model_config, unquantised=base.unquantised
            ).write(out)
        except NotLayerByLayer as reason:
            notes.append(f"merged as a whole, in memory: {reason}")
            notes += _merge_as_a_whole(adapter, out, base)
    except (RuntimeError, ValueError) as error:
        reason_given = " ".join(str(error).split())[:300]
        raise UserError(
            f"--adapter {str(adapter)!r} does not fit model.name_or_path={base.path!r} ({reason_given})"
        ) from None
    if config.task.type == "seq2seq":  # which the tokenizer is saved with
        set_languages(config.task, base.tokenizer, base.model_config)
    base.tokenizer.save_pretrained(str(out))
    # or other programs would write on behind an answer's end
    add_settings(out, lambda ends: answer_settings(config.task, base.tokenizer, base.model_config, ends))
    return notes


def _merge_as_a_whole(adapter: Path, out: Path, described: AdaptedBase) -> list[str]:
    config, base = described.config, described.load()
    own = own_type(saved_kind(adapter))
    if own is not None:
        whole = own.merged(base, adapter)
        whole.config.use_cache = True
        save_model(whole, out, max_shard_size=SHARD_BYTES)
        return []
    ties, transposed = ties_of(base), transposed_layers(base)
    if config.model.quantization != "none":
        base = dequantised(base)
    adapted: Any = PeftModel.from_pretrained(base, str(adapter))
    untie_adapted(adapted)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    transpose_again(merged, transposed)
    merged.config.use_cache = True
    if is_untied(merged, ties):
        key = f"--adapter {str(adapter)!r}"
        save_untied(merged, ties, out, key=key)
        return ["embeddings and output layer share their weights no longer (tie_word_embeddings: false)"]
    save_model(merged, out, max_shard_size=SHARD_BYTES)
    return []
