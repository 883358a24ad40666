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


def config_parser(name: str, description: str) -> Parser:
    """A parser of a config file and values that win over it."""
    parser = Parser(prog=name, description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file (configs/)")
    add_overrides(parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The values that win over a config file."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file")
