"""``launch/evaluate.py``: metrics of a saved adapter, on the held-out set or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsqlora_scale.api import evaluate, evaluate_tasks
from tsqlora_scale.commands.arguments import add_trained, config_file, config_parser, trained_place
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import written_whole
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("evaluate", "Metrics of a saved adapter on the config's development file.", of_run=True)
    add_trained(parser)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "--lm-eval",
        metavar="TASK,TASK,...",
        help="in its place: tasks of lm-evaluation-harness, of the base and of the adapter",
    )
    parser.add_argument("--lm-eval-tasks", metavar="DIR", help="with --lm-eval: a folder of tasks of one's own")
    parser.add_argument("--lm-eval-limit", type=int, metavar="N", help="with --lm-eval: rows of a task at most")
    parser.add_argument("--lm-eval-shots", type=int, metavar="N", help="with --lm-eval: examples in a prompt")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: _evaluate(options) if options.lm_eval is None else _evaluate_tasks(options))


def _evaluate(options: argparse.Namespace) -> None:
    for name in ("tasks", "limit", "shots"):
        if getattr(options, f"lm_eval_{name}") is not None:
            raise UserError(f"--lm-eval-{name} goes with --lm-eval TASKS")
    _check_file(options.json)
    place = trained_place(options)
    metrics = evaluate(load_config(config_file(options), options.overrides), place)
    if launched_rank() == 0:
        for name, value in metrics.items():
            print(f"{name}: {value:.6f}")
        _write(options.json, {"adapter": place, "metrics": metrics})


def _evaluate_tasks(options: argparse.Namespace) -> None:
    _check_file(options.json)
    place = trained_place(options)
    results = evaluate_tasks(
        load_config(config_file(options), options.overrides),
        place,
        options.lm_eval.split(","),
        folder=options.lm_eval_tasks,
        limit=options.lm_eval_limit,
        shots=options.lm_eval_shots,
    )
    from tsqlora_scale.report.export_tables import print_tasks
    from tsqlora_scale.report.result_table import versions

    print_tasks(results, place)
    known = versions() | {"lm-eval": importlib.metadata.version("lm_eval")}
    _write(options.json, {"adapter": place, "tasks": results, "versions": known})


def _check_file(path: str | None) -> None:
    """Before anything is loaded, on the rank that writes.

    Raises:
        UserError: there is no folder for the file.
    """
    if launched_rank() == 0 and path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UserError(f"--json {path!r} cannot be written: give a file in a folder that is there")


def _write(path: str | None, values: dict[str, Any]) -> None:
    """Write a file of numbers, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        return
    try:
        with written_whole(Path(path)) as partial:
            partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path!r} cannot be written ({error.strerror}); choose another") from None
