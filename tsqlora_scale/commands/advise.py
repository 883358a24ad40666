"""``launch/advise.py``: whether a choice among the data would pay, before a run is paid for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import advise
from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("advise", "Whether a choice among the data would pay: a look, short trials, a verdict.")
    parser.add_argument("--rows", type=int, default=2000, help="of the pool that are looked at (default 2000)")
    parser.add_argument(
        "--pilot",
        choices=("heads", "adapters"),
        default="heads",
        help="what is tried: heads on frozen features, in seconds (default), or the config's own adapters, in minutes",
    )
    parser.add_argument("--steps", type=int, help="of each training of --pilot adapters (default 60)")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _advise(options))


def _advise(options: argparse.Namespace) -> None:
    result = advise(
        load_config(options.config, options.overrides), rows=options.rows, pilot=options.pilot, steps=options.steps
    )
    if launched_rank() == 0:
        from tsqlora_scale.advice.advice_tables import print_advice

        print_advice(result)
