"""``launch/compare.py``: arms that are tuned alike, over tasks and seeds; tables and figures of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tsqlora_scale.commands.arguments import Parser, add_overrides
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_size


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code: 1 where runs have failed or are missing."""
    parser = Parser(prog="compare", description="Run arms over tasks and seeds, tuned alike; write tables and figures.")
    parser.add_argument("--config", metavar="FILE", help="a comparison's YAML file (configs/compare/)")
    parser.add_argument("--small", action="store_true", help="as the file's section 'small' says: stand-ins, two cores")
    parser.add_argument("--out", metavar="DIR", help="runs, tables and figures (default runs/compare/NAME)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once (default 1)")
    parser.add_argument("--shard", metavar="I/N", help="run only this share, from 0; the tables come by --tables-only")
    parser.add_argument("--config_file", type=Path, metavar="FILE", help="start runs by accelerate launch with this")
    parser.add_argument("--num_processes", type=int, metavar="N", help="of a run, with --config_file")
    parser.add_argument("--dry-run", action="store_true", help="check all arms, list the runs, stop")
    parser.add_argument("--tables-only", action="store_true", help="run nothing; write tables of what is there")
    parser.add_argument("--figures", action="store_true", help="draw figures, too (needs matplotlib)")
    parser.add_argument("--figures-only", action="store_true", help="run nothing; draw figures of what is there")
    parser.add_argument("--figures-of", nargs="+", type=Path, metavar="RUN", help="draw figures of run folders, stop")
    parser.add_argument("--image", choices=("svg", "png"), default="svg", help="format of figures (default svg)")
    parser.add_argument(
        "--leave-out-refused",
        action="store_true",
        help="go on without arms whose config is refused; they count as failed",
    )
    add_overrides(parser)
    options = parser.parse_intermixed_args(argv)
    codes: list[int] = []
    code = guard(lambda: codes.append(_compare(options)), resume="")
    return code or next(iter(codes), 1)  # nothing is said by one that was asked to stop: runs are missing


def _compare(options: argparse.Namespace) -> int:
    if launched_size() > 1:
        raise UserError("start compare.py by itself: it starts the launcher of every run (--config_file FILE)")
    if options.figures_of is not None:
        return _draw_runs(options)
    if options.config is None:
        raise UserError("--config is missing: a comparison's YAML file, such as those in configs/compare/")
    from tsqlora_scale.comparison.comparison_run import ComparisonRun
    from tsqlora_scale.comparison.processes import Launch
    from tsqlora_scale.comparison.trial_queue import Shard

    launch = Launch(options.config_file, options.num_processes, options.workers)
    launch.check()
    comparison = ComparisonRun(
        options.config,
        out=options.out,
        small=options.small,
        overrides=options.overrides,
        leave_out=options.leave_out_refused,
        shard=Shard() if options.shard is None else Shard.parse(options.shard),
        runs=not (options.tables_only or options.figures_only),
    )
    if options.dry_run:
        print("\n".join([f"folder: {comparison.out}", *comparison.plan()]))
        return 0
    if not (options.tables_only or options.figures_only):
        comparison.run(launch)
    wants_figures = options.figures or options.figures_only
    result = comparison.report(
        figures=options.image if wants_figures else None, tables=options.shard is None and not options.figures_only
    )
    if result.text:
        print(result.text)
        print(f"tables: {result.out / 'tables.md'}, {result.out / 'tables.csv'}, {result.out / 'runs.csv'}")
    for path in result.figures:
        print(f"figure: {path}")
    return 1 if result.failed or result.missing else 0


def _draw_runs(options: argparse.Namespace) -> int:
    from tsqlora_scale.comparison.drawn_figures import draw_runs

    for path in draw_runs(options.figures_of, Path(options.out or "figures"), kind=options.image):
        print(f"figure: {path}")
    return 0
