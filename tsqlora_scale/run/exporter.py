"""The requests for other forms of a trained adapter: checks, and then the writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank, launched_size
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.schema import Config

Form = Literal["peft", "padded", "vllm", "merged", "gguf"]


def export(
    adapter: str | Path,
    form: Form,
    out: str | Path,
    *,
    config: Config | None = None,
    overwrite: bool = False,
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = "f16",
    push: str | None = None,
    public: bool = False,
) -> list[str]:
    """Write a trained adapter in another form, whole or not at all. Under a launcher rank 0 alone does it.

    Args:
        adapter: an adapter's folder, a run folder or a checkpoint.
        form: ``peft``, as it is; ``padded``, with one rank everywhere; ``vllm``, with one that vLLM takes; ``merged``
            into its base, of any size; or that as one ``gguf`` file.
        out: the folder to write.
        config: of the run; needed by the forms that hold the base.
        overwrite: replace what is there.
        gguf_type: of the matrices in a GGUF file.
        push: a repository of the Hugging Face hub (or of ``HF_ENDPOINT``) that gets the folder's files, too.
        public: whether everybody may read that repository.

    Returns:
        What is worth saying about it, line by line; nothing on other ranks.

    Raises:
        UserError: no adapter there, no config to merge by, something at ``out`` already, a form that cannot hold it;
            or no hub that takes it.
    """
    prepare_environment()
    if launched_rank() != 0:
        return []
    from tsqlora_scale.common.quiet import quiet_libraries
    from tsqlora_scale.model import hub_push
    from tsqlora_scale.model.export_formats import FORMATS, GGUF_TYPES
    from tsqlora_scale.model.export_formats import export as write

    if form not in FORMATS:
        raise UserError(f"form={form!r}: is none of {', '.join(map(repr, FORMATS))}")
    if gguf_type not in GGUF_TYPES:
        raise UserError(f"gguf_type={gguf_type!r}: is none of {', '.join(map(repr, GGUF_TYPES))}")
    if public and push is None:
        raise UserError("--public (public) is about a repository; give --push REPO with it")
    if push is not None:
        hub_push.check_push(push)
    if config is not None:
        from tsqlora_scale.run.labels_of_run import with_labels_of

        config = with_labels_of(config, Path(adapter))
    from tsqlora_scale.run.trained_adapter import adapter_folder

    _check_place(Path(out), Path(adapter), config, overwrite=overwrite)
    with adapter_folder(adapter) as folder, quiet_libraries():
        notes = write(folder, form, Path(out), config=config, overwrite=overwrite, gguf_type=gguf_type)
        return notes if push is None else [*notes, *hub_push.push(Path(out), push, public=public)]


def truncate(
    adapter: str | Path,
    ranks: Sequence[int],
    out: str | Path,
    *,
    by: Literal["uniform", "total"] = "uniform",
    config: Config | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Cut a trained adapter to lower ranks: ``rank-N/`` of each, and a table of what each loses. In one process.

    Every layer's B A becomes its best approximation of the new rank; nothing is trained.

    Args:
        adapter: an adapter's folder, a run folder or a checkpoint.
        ranks: of every layer at most, or on average.
        out: the folder to write.
        by: ``uniform``: no layer keeps more than the rank; ``total``: as many components as the rank times the number
            of layers, those of the largest singular values of all layers' scaled updates.
        config: of the run, to measure each cut, and the adapter as it is, on the held-out set: metrics and loss.
        overwrite: replace what is there.

    Returns:
        The table's rows, the adapter as it is first: ``rank`` (None), ``parameters`` of its factors, ``error``, the
        share of the update's norm that is lost, and ``metrics``, where they were measured.

    Raises:
        UserError: as :func:`export` and ``evaluate``, or a rank that the adapter cannot be cut to.
    """
    prepare_environment()
    if launched_size() > 1:
        raise UserError(f"--ranks works in one process, not in {launched_size()}; start it without a launcher")
    from tsqlora_scale.model.export_formats import check_out
    from tsqlora_scale.run.trained_adapter import adapter_folder
    from tsqlora_scale.run.truncations import check_ranks, with_loss, write_truncations

    if by not in ("uniform", "total"):
        raise UserError(f"by={by!r}: is neither 'uniform' nor 'total'")
    ranks = list(dict.fromkeys(ranks))
    with adapter_folder(adapter) as folder:
        check_ranks(folder, ranks)
        check_out(Path(out), folder, overwrite=overwrite)
        _check_place(Path(out), Path(adapter), config, overwrite=overwrite)
        checked = None
        if config is not None:
            from tsqlora_scale.model.adapters.adapter_type import saved_kind
            from tsqlora_scale.run import preflight
            from tsqlora_scale.run.labels_of_run import with_labels_of

            if saved_kind(folder) == "loratrf":
                raise UserError("--ranks: cuts of adapter.type=loratrf are not measured; leave out --config")
            config = with_labels_of(config, Path(adapter))
            checked = preflight.check_evaluation(with_loss(config), folder)
        return write_truncations(folder, Path(out), list(ranks), by=by, checked=checked, overwrite=overwrite)


def _check_place(out: Path, adapter: Path, config: Config | None, *, overwrite: bool) -> None:
    """Raises:
    UserError: what is written would replace what is read: a run or a checkpoint, of which a copy is, or the base.
    """
    from tsqlora_scale.model.export_formats import check_out

    check_out(out, adapter, overwrite=overwrite)
    base = None if config is None else Path(config.model.name_or_path)
    if base is not None and base.is_dir():
        check_out(out, base, overwrite=overwrite, what="the base")
