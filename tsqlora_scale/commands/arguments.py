"""What the commands have in common in their arguments."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import printable
from tsqlora_scale.common.streams import take_whatever_is_printed


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others are."""

    def __init__(self, **options: Any) -> None:
        take_whatever_is_printed()
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, on rank 0, and leave with exit code 2."""
        if launched_rank() == 0:
            print(f"error: {printable(message)}; {self.prog} --help says what there is", file=sys.stderr)
        sys.exit(2)


def config_parser(name: str, description: str, *, of_run: bool = False) -> Parser:
    """A parser of a config file and values that win over it.

    Args:
        of_run: whether the config may be left out, because the command is about a run that has one.
    """
    parser = Parser(prog=name, description=description)
    note = ", in the place of the run's own" if of_run else " (configs/)"
    parser.add_argument("--config", required=not of_run, metavar="FILE", help=f"a YAML file{note}")
    add_overrides(parser)
    return parser


def add_trained(parser: argparse.ArgumentParser) -> None:
    """What a run has trained: one of two options, for the same things."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--adapter", metavar="DIR", help="the adapter folder that a run wrote, or a checkpoint of it")
    # torchrun takes --run for a short form of its own options
    either.add_argument("--run", "--run-dir", metavar="DIR", help="a run folder, for its adapter and its config.yaml")


def trained_place(options: argparse.Namespace) -> str:
    """The folder that ``--adapter`` or ``--run`` names."""
    return str(options.run if options.adapter is None else options.adapter)


def config_file(options: argparse.Namespace) -> str:
    """The config's file: ``--config``, or that of the run that the trained adapter belongs to.

    Raises:
        UserError: neither.
    """
    if options.config is not None:
        return str(options.config)
    from tsqlora_scale.run.trained_adapter import config_of

    return str(config_of(trained_place(options), option="--adapter" if options.run is None else "--run"))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The values that win over a config file."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file")
