"""``launch/score.py``: score a pool without training on the scores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tsqlora_scale.api import audit, score
from tsqlora_scale.commands.arguments import config_parser
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = config_parser("score", "Score a pool: the samples that look best, worst, mislabelled, and redundant.")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="score with this trained adapter (a checkpoint, a run folder); without it, warm up",
    )
    parser.add_argument(
        "--audit", action="store_true", help="which labels are probably wrong, each judged by what has not seen it"
    )
    parser.add_argument("--top", type=int, default=5, help="samples in each list (default 5)")
    parser.add_argument("--similarity", type=float, default=0.98, help="cosine of like samples (default 0.98)")
    parser.add_argument("--overwrite", action="store_true", help="start anew where another run has been")
    parser.add_argument("--resume", action="store_true", help="continue a pass that was killed")
    options = parser.parse_intermixed_args(argv)
    return guard(
        lambda: (_audit if options.audit else _score)(options),
        resume="--audit --resume" if options.audit else "--resume",
    )


def _audit(options: argparse.Namespace) -> None:
    if options.adapter is not None:
        raise UserError(
            f"--adapter {options.adapter!r}: has learned from the labels that --audit is to judge; leave it out"
        )
    result = audit(
        load_config(options.config, options.overrides),
        top=options.top,
        similarity=options.similarity,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    if launched_rank() == 0:
        from tsqlora_scale.audit.audit_tables import print_audit

        print_audit(result.summary, result.suspects, str(result.page), str(result.fixes))


def _score(options: argparse.Namespace) -> None:
    result = score(
        load_config(options.config, options.overrides),
        adapter=options.adapter,
        top=options.top,
        similarity=options.similarity,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    if launched_rank() == 0:
        from tsqlora_scale.report.score_tables import print_scores

        print_scores(result.summary, str(result.file))
