"""``launch/evaluate.py``: metrics of a saved adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import evaluate
from tsqlora_scale.commands.arguments import add_trained, config_file, config_parser, trained_place
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("evaluate", "Metrics of a saved adapter on the config's development file.", of_run=True)
    add_trained(parser)
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    metrics = evaluate(load_config(config_file(options), options.overrides), trained_place(options))
    if launched_rank() == 0:
        for name, value in metrics.items():
            print(f"{name}: {value:.6f}")
