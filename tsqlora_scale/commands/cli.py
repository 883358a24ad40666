"""The commands: thin wrappers over the package. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tsqlora_scale.common.errors import Stopped, UserError
from tsqlora_scale.common.failures import fail, leave_group, let_others_speak, record_cause
from tsqlora_scale.common.launcher import launched_rank, launched_size, speaks_for_machine
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config


def train(argv: Sequence[str] | None = None) -> int:
    """``launch/train.py``: train as a config says."""
    parser = _parser("train", "Train as a config says: TsqLoRA, or plain LoRA beside it.")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the config and the plan, stop")
    parser.add_argument("--overwrite", action="store_true", help="start anew where another run has been")
    parser.add_argument("--resume", metavar="auto|DIR", help="continue from the newest checkpoint, or from this one")
    options = parser.parse_intermixed_args(argv)
    return _guard(lambda: _train(options))


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``launch/evaluate.py``: metrics of a saved adapter."""
    parser = _parser("evaluate", "Metrics of a saved adapter on the config's development file.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter folder that a run wrote")
    options = parser.parse_intermixed_args(argv)
    return _guard(lambda: _evaluate(options))


def score(argv: Sequence[str] | None = None) -> int:
    """``launch/score.py``: score a pool without training on the scores."""
    parser = _parser("score", "Score a pool: the samples that look best, worst, mislabelled, and redundant.")
    parser.add_argument("--adapter", metavar="DIR", help="score with this trained adapter; without it, warm up first")
    parser.add_argument("--top", type=int, default=5, help="samples in each list (default 5)")
    parser.add_argument("--similarity", type=float, default=0.98, help="cosine of like samples (default 0.98)")
    parser.add_argument("--overwrite", action="store_true", help="start anew where another run has been")
    parser.add_argument("--resume", action="store_true", help="continue a pass that was killed")
    options = parser.parse_intermixed_args(argv)
    return _guard(lambda: _score(options), resume="--resume")


def export(argv: Sequence[str] | None = None) -> int:
    """``launch/export.py``: a saved adapter as PEFT, with one rank everywhere, or merged into its base."""
    parser = _Parser(prog="export", description="Write a trained adapter in another form.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter folder that a run wrote")
    parser.add_argument("--format", required=True, choices=["peft", "padded", "merged"], help="the form")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--config", metavar="FILE", help="the run's config.yaml, to merge by")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file")
    options = parser.parse_intermixed_args(argv)
    return _guard(lambda: _export(options))


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        if launched_rank() == 0:
            print(f"error: {printable(message)}; {self.prog} --help says what there is", file=sys.stderr)
        sys.exit(2)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "score": score,
    "evaluate": evaluate,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """``tsqlora COMMAND …``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: tsqlora {{{','.join(COMMANDS)}}} --config FILE [section.key=value ...]", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    return COMMANDS[arguments[0]](arguments[1:])


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=name, description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file (configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file")
    return parser


def _guard(command: Callable[[], None], *, resume: str = "--resume auto") -> int:
    """Run a command; a :class:`UserError` becomes one line on rank 0 and exit code 2 on every rank.

    Args:
        resume: the option by which the command continues after it was asked to stop.
    """
    _prepare_environment()
    code = 0
    try:
        command()
    except UserError as error:
        record_cause(f"error: {error}", f"error: {error}")
        if launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        elif speaks_for_machine():  # what is wrong here may be right where rank 0 is
            print(f"error on {platform.node()}: {error}", file=sys.stderr)
        else:
            let_others_speak()
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Stopped as stopped:
        if launched_rank() == 0:
            print(f"requeue: {printable(str(stopped))}; the same command with {resume} continues")
    except Exception as error:
        if launched_size() == 1:
            raise
        fail(error)
    leave_group(code)
    return code


def _prepare_environment() -> None:
    """Before the heavy libraries are imported: start-up messages that help nobody, sums that depend on threads."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same products on any number of threads, at no cost
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level at import; a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.resume == "":
        raise UserError("--resume '' names nothing; give auto or a checkpoint folder, or leave it out")
    from tsqlora_scale.run import preflight

    if not options.dry_run:
        preflight.check_run_dir(config, overwrite=options.overwrite, resume=options.resume)
    checked = preflight.check(config)
    if options.dry_run:
        if launched_rank() == 0:
            print(config.to_yaml())
            print("\n".join(checked.plan.lines()))
        return
    from tsqlora_scale.proxy import discard_parts, score_by_proxy
    from tsqlora_scale.report.result_table import print_result
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.preemption import StopRequest
    from tsqlora_scale.training import train as train_run

    with StopRequest() as stop:
        scores = score_by_proxy(checked, resume=options.resume, stop=stop)
        run = build_run(checked, resume=options.resume, stop=stop)
        saved = scores is None or run.take_scores(scores.table, scores.seconds)
        if run.is_main and saved:
            discard_parts(config)
        result = train_run(run)
    if run.is_main:
        discard_parts(config)
        print_result(result)


def _score(options: argparse.Namespace) -> None:
    config = load_config(options.config, [*options.overrides, "scoring.keep_sketches=true"])
    if config.scoring.proxy_model is not None:
        raise UserError(
            f"scoring.proxy_model={config.scoring.proxy_model!r} is for training; to score with it, set "
            "model.name_or_path to it and scoring.proxy_model=null"
        )
    if not config.scores_data:
        raise UserError(
            "there is nothing to score: adapter.method must be 'tsqlora', scoring.enabled true and "
            "sampling.selector 'quality'"
        )
    if options.top < 1:
        raise UserError(f"--top {options.top} must be 1 or more")
    if not 0 < options.similarity <= 1:
        raise UserError(f"--similarity {options.similarity:g} must be above 0 and at most 1")
    from tsqlora_scale.model.describe import check_adapter_fits
    from tsqlora_scale.run import preflight

    preflight.check_run_dir(config, overwrite=options.overwrite, resume="auto" if options.resume else None)
    checked = preflight.check(config)
    if options.adapter is not None:
        check_adapter_fits(config, checked.model_config, options.adapter)
    from tsqlora_scale.report.score_tables import print_scores
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.preemption import StopRequest
    from tsqlora_scale.scoring import score as score_run

    with StopRequest() as stop:
        run = build_run(checked, resume="auto" if options.resume else None, adapter=options.adapter, stop=stop)
        summary = score_run(run, top=options.top, similarity=options.similarity, warm_up=options.adapter is None)
    if run.is_main:
        print_scores(summary, str(run.record.folder / "scores"))


def _evaluate(options: argparse.Namespace) -> None:
    config: Config = load_config(options.config, options.overrides)
    from tsqlora_scale.run import preflight

    checked = preflight.check_evaluation(config, options.adapter)
    from tsqlora_scale.run.build import evaluate_adapter

    metrics, is_main = evaluate_adapter(checked, options.adapter)
    if is_main:
        for name, value in metrics.items():
            print(f"{name}: {value:.6f}")


def _export(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides) if options.config else None
    from pathlib import Path

    from tsqlora_scale.common.quiet import quiet_libraries
    from tsqlora_scale.model.export_formats import export as write

    with quiet_libraries():
        said = write(
            Path(options.adapter), options.format, Path(options.out), config=config, overwrite=options.overwrite
        )
    print("\n".join([*said, f"written: {printable(options.out)}"]))
