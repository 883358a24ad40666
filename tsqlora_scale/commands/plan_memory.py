"""``launch/plan.py``: what a run will need, memory and time, before anything of it is there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("plan", "Memory by part under every engine, an engine that fits, and the time by phase.")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, one rank on each (default 1)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device; an engine that fits is proposed")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="that all devices train on: gives hours")
    parser.add_argument("--pool", type=int, metavar="N", help="samples of the pool; without it the data are read")
    parser.add_argument("--dev", type=int, metavar="N", help="held-out rows, beside --pool (default 0)")
    parser.add_argument("--on", choices=("gpu", "cpu"), default="gpu", help="whose kernels compute (default gpu)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> None:
    from tsqlora_scale.planning.forecast import check_machine_size, forecast
    from tsqlora_scale.planning.forecast_tables import print_forecast

    check_machine_size(options.devices, options.memory, options.tokens_per_second)
    config, pool, dev = _with_sizes(load_config(options.config, options.overrides), options)
    found = forecast(
        config,
        pool_size=pool,
        dev_size=dev,
        devices=options.devices,
        memory=None if options.memory is None else int(options.memory * 2**30),
        tokens_per_second=options.tokens_per_second,
        machine=options.on,
    )
    if launched_rank() == 0:
        if options.json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            print_forecast(found)


def _with_sizes(config: Config, options: argparse.Namespace) -> tuple[Config, int, int]:
    """The config with the classes of the data, and the sizes of pool and held-out sets."""
    if options.pool is not None:
        for name in ("pool", "dev"):
            if (getattr(options, name) or 0) < (name == "pool"):
                raise UserError(f"--{name} {getattr(options, name)}: give a number of rows")
        return config, options.pool, options.dev or 0
    if options.dev is not None:
        raise UserError(f"--dev {options.dev} goes with --pool; without both the data are read")
    from tsqlora_scale.tasks import load_data

    try:
        data = load_data(config.task, seed=config.run.seed)
    except UserError as error:
        raise UserError(f"{error}; or give --pool N, and no data are read") from None
    held_out = [data.dev, *data.more_dev.values()]
    sizes = [len(rows) for rows in held_out if rows is not None]
    return config.with_labels(data.labels), len(data.pool(with_query=config.task.train_on_query)), sum(sizes)
