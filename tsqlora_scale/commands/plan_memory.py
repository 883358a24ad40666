"""``launch/plan.py``: what a run will need, memory and time, before anything of it is there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("plan", "Memory by part under every engine, an engine that fits, and the time by phase.")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, one rank on each (default 1)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device; an engine that fits is proposed")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="that all devices train on: gives hours")
    parser.add_argument("--link", type=float, metavar="GB/S", help="that a device receives of others: hours by engine")
    parser.add_argument("--pool", type=int, metavar="N", help="samples of the pool; without it the data are read")
    parser.add_argument("--dev", type=int, metavar="N", help="held-out rows, beside --pool (default 0)")
    parser.add_argument("--on", choices=("gpu", "cpu"), default="gpu", help="whose kernels compute (default gpu)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> None:
    from tsqlora_scale.planning.planner import plan

    found = plan(
        load_config(options.config, options.overrides),
        devices=options.devices,
        memory=options.memory,
        tokens_per_second=options.tokens_per_second,
        link=options.link,
        machine=options.on,
        pool=options.pool,
        dev=options.dev,
    )
    if launched_rank() != 0:
        return
    from tsqlora_scale.planning.forecast_tables import print_forecast

    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_forecast(found)
