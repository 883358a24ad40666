"""``launch/export.py``: a saved adapter in the forms that others want, or at lower ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import export, truncate
from tsqlora_scale.commands.arguments import Parser, add_overrides, add_trained, config_file, trained_place
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import printable, shown
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config

_FORMS = ["peft", "padded", "vllm", "merged", "gguf"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = Parser(prog="export", description="Write a trained adapter in another form, or cut to lower ranks.")
    add_trained(parser)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--format", choices=_FORMS, help="the form")
    either.add_argument("--ranks", metavar="N,N,...", help="adapters of these ranks, the best approximations")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--config", metavar="FILE", help="a config to merge or measure by, in the place of the run's")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--gguf-type", choices=["f32", "f16", "bf16", "q8_0"], help="with --format gguf: of matrices (default f16)"
    )
    parser.add_argument(
        "--cut-by",
        choices=["uniform", "total"],
        help="with --ranks: each layer's own (default), or shared out over the layers by singular values",
    )
    parser.add_argument("--push", metavar="REPO", help="send the folder to a hub, too: NAMESPACE/NAME, made private")
    parser.add_argument("--public", action="store_true", help="with --push: everybody may read it")
    add_overrides(parser)
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _export(options) if options.ranks is None else _cut(options))


def _export(options: argparse.Namespace) -> None:
    if options.cut_by is not None:
        raise UserError(f"--cut-by {options.cut_by} goes with --ranks")
    if options.gguf_type is not None and options.format != "gguf":
        raise UserError(f"--gguf-type {options.gguf_type} goes with --format gguf, not {options.format}")
    notes = export(
        trained_place(options),
        options.format,
        options.out,
        config=_config(options),
        overwrite=options.overwrite,
        gguf_type=options.gguf_type or "f16",
        push=options.push,
        public=options.public,
    )
    if launched_rank() == 0:
        print("\n".join([*map(printable, notes), f"written: {printable(options.out)}"]))


def _cut(options: argparse.Namespace) -> None:
    for name in ("gguf_type", "push"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --format, not with --ranks")
    try:
        ranks = [int(rank) for rank in options.ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks {shown(options.ranks)}: give whole numbers, as 8,16,32") from None
    rows = truncate(
        trained_place(options),
        ranks,
        options.out,
        by=options.cut_by or "uniform",
        config=_config(options),
        overwrite=options.overwrite,
    )
    from tsqlora_scale.report.export_tables import print_truncations

    print_truncations(rows, options.out)


def _config(options: argparse.Namespace) -> Config | None:
    """The config by which a base is loaded, where one is named: by itself, or by a run."""
    needs_config = options.config is not None or options.run is not None
    return load_config(config_file(options), options.overrides) if needs_config else None
