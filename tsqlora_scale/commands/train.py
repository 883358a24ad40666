"""``launch/train.py``: train as a config says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import train
from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("train", "Train as a config says: TsqLoRA, or plain LoRA beside it.")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the config and the plan, stop")
    parser.add_argument("--overwrite", action="store_true", help="start anew where another run has been")
    parser.add_argument("--resume", metavar="auto|DIR", help="continue from the newest checkpoint, or from this one")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _train(options))


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        _show_plan(config)
        return
    result = train(config, resume=options.resume, overwrite=options.overwrite)
    if launched_rank() == 0:
        from tsqlora_scale.report.result_table import print_result

        print_result(result.record)


def _show_plan(config: Config) -> None:
    from tsqlora_scale.run import preflight

    checked = preflight.check(config)
    if launched_rank() == 0:
        from tsqlora_scale.report.input_preview import input_preview

        print(checked.config.to_yaml())
        print("\n".join([*checked.plan.lines(), *input_preview(checked.task, seed=config.run.seed)]))
