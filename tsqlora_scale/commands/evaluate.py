"""``launch/evaluate.py``: metrics of a saved adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import evaluate
from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("evaluate", "Metrics of a saved adapter on the config's development file.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter folder that a run wrote")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    metrics = evaluate(load_config(options.config, options.overrides), options.adapter)
    if launched_rank() == 0:
        for name, value in metrics.items():
            print(f"{name}: {value:.6f}")
