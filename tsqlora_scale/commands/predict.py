"""``launch/predict.py``: a saved adapter's answers to new rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import predict
from tsqlora_scale.commands.arguments import Parser, add_overrides
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = Parser(
        prog="predict", description="Answer new rows by a saved adapter, and write the answers beside them."
    )
    # the second name is for torchrun, which takes the first for an abbreviation of two of its own
    parser.add_argument("--run", "--run-dir", metavar="DIR", help="the run folder, for its config and its adapter")
    parser.add_argument("--adapter", metavar="DIR", help="the adapter folder that a run wrote, or a checkpoint of it")
    parser.add_argument("--config", metavar="FILE", help="the run's config, where it does not lie beside the adapter")
    parser.add_argument("--data", required=True, metavar="FILE", help="the rows: csv, tsv, jsonl or parquet")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write: .csv, .tsv, .jsonl or .parquet"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_overrides(parser)
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _predict(options))


def _predict(options: argparse.Namespace) -> None:
    result = predict(
        options.data,
        options.out,
        run=options.run,
        adapter=options.adapter,
        config=_config(options),
        overwrite=options.overwrite,
    )
    if launched_rank() == 0:
        print(f"written: {printable(str(result.out))} ({result.rows} rows)")


def _config(options: argparse.Namespace) -> Config:
    from tsqlora_scale.run.prediction_place import find_adapter, find_config

    if options.run is not None and options.adapter is not None:
        raise UserError("--run and --adapter: give one of them")
    if options.config is not None:
        return load_config(options.config, options.overrides)
    return find_config(options.run, find_adapter(options.run, options.adapter), options.overrides)
