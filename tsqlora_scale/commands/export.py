"""``launch/export.py``: a saved adapter as PEFT, with one rank everywhere, or merged into its base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import export
from tsqlora_scale.commands.arguments import Parser, add_overrides, add_trained, config_file, trained_place
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = Parser(prog="export", description="Write a trained adapter in another form.")
    add_trained(parser)
    parser.add_argument("--format", required=True, choices=["peft", "padded", "merged"], help="the form")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--config", metavar="FILE", help="a config to merge by, in the place of the run's own")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--push", metavar="REPO", help="send the folder to a hub, too: NAMESPACE/NAME, made private")
    parser.add_argument("--public", action="store_true", help="with --push: everybody may read it")
    add_overrides(parser)
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    needs_config = options.config is not None or options.run is not None
    config = load_config(config_file(options), options.overrides) if needs_config else None
    notes = export(
        trained_place(options),
        options.format,
        options.out,
        config=config,
        overwrite=options.overwrite,
        push=options.push,
        public=options.public,
    )
    if launched_rank() == 0:
        print("\n".join([*map(printable, notes), f"written: {printable(options.out)}"]))
