"""Plan, train, score, advise, evaluate, predict and export from Python: the commands, without a process around them.

A user's mistake raises :class:`~tsqlora_scale.common.errors.UserError`, a request to stop
:class:`~tsqlora_scale.common.errors.Stopped`; nothing ends the process. Under a launcher every rank makes the same
calls.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora_scale.advice.advisor import advise as advise
from tsqlora_scale.audit.audit_result import AuditResult
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.quality_sections import BLIND_SELECTORS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.planner import plan as plan
from tsqlora_scale.report.run_results import PredictResult, ScoreResult, TrainResult
from tsqlora_scale.run.exporter import export as export
from tsqlora_scale.run.exporter import truncate as truncate
from tsqlora_scale.run.harness import evaluate_tasks as evaluate_tasks

if TYPE_CHECKING:
    from tsqlora_scale.run.run_lock import RunLock


def train(config: Config, *, resume: str | Path | None = None, overwrite: bool = False) -> TrainResult:
    """Train as a config says. A collective, under a launcher.

    Args:
        resume: ``"auto"``, to go on from the newest complete checkpoint of the run folder if there is one, or a
            checkpoint's folder.
        overwrite: start anew where another run has been.

    Raises:
        UserError: a mistake in the config, the data, the model or the folders; nothing is loaded where it can be seen
            before.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C has come, and the run's state is in a checkpoint.
    """
    prepare_environment()
    if resume is not None and not str(resume):
        raise UserError("--resume '' (resume) names nothing; give auto or a checkpoint folder, or leave it out")
    from tsqlora_scale.run import preflight

    place = None if resume is None else str(resume)
    preflight.check_run_dir(config, overwrite=overwrite, resume=place)
    from tsqlora_scale.run.resume import has_checkpoint

    checked = preflight.check(config, starts=place is None or not has_checkpoint(config.run_dir, place))
    from tsqlora_scale.proxy import discard_parts, pretrain, score_by_proxy, take_scores
    from tsqlora_scale.report.input_preview import input_preview
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.preemption import StopRequest
    from tsqlora_scale.training import train_to_the_end

    with StopRequest() as stop, _only_writer(config, overwrite=overwrite, resume=place) as lock:
        start = pretrain(checked, resume=place, stop=stop, lock=lock)
        scores = score_by_proxy(checked, resume=place, stop=stop, lock=lock)
        run = build_run(checked, resume=place, pretrained=start, stop=stop, lock=lock)
        are_kept = scores is None or take_scores(run, scores)
        if run.is_main and are_kept:
            discard_parts(config)
        if run.is_main and run.step == 0:
            print("\n".join(input_preview(run.task, seed=config.run.seed)), file=sys.stderr)
        record = train_to_the_end(run)
        if run.is_main:
            discard_parts(config)
    run.engine.close()
    return TrainResult(
        folder=config.run_dir,
        adapter=Path(record["adapter"]),
        metrics=record["metrics"],
        metrics_before=record["metrics_before"],
        ranks=record["kept"]["ranks"],
        seconds=record["seconds"],
        record=record,
    )


def score(
    config: Config,
    *,
    adapter: str | Path | None = None,
    top: int = 5,
    similarity: float = 0.98,
    resume: bool = False,
    overwrite: bool = False,
) -> ScoreResult:
    """Score a pool without training on the scores. A collective, under a launcher.

    Args:
        adapter: a trained adapter to score with: its folder, a run folder or a checkpoint; without it a fresh one
            warms up first, as at step 0 scores are blind.
        top: samples of each list of the summary, and groups of similar ones.
        similarity: cosine of two gradients from which on two samples are said to teach the same.
        resume: go on with a pass that was killed.
        overwrite: start anew where another run has been.

    Raises:
        UserError: as :func:`train`, or there is nothing to score, or the scores cannot be written.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C has come; ``resume=True`` goes on.
    """
    prepare_environment()
    config = _for_scoring(config, adapter)
    _check_options(top, similarity)
    from tsqlora_scale.run import preflight
    from tsqlora_scale.run.labels_of_run import with_labels_of
    from tsqlora_scale.run.resume import has_checkpoint

    place = "auto" if resume else None
    preflight.check_run_dir(config, overwrite=overwrite, resume=place, adapter=adapter)
    if adapter is not None:
        config = with_labels_of(config, Path(adapter))
    checked = preflight.check(config, starts=adapter is None and not (place and has_checkpoint(config.run_dir, place)))
    from tsqlora_scale.report.score_summary import summarise_selector, write_summary
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.preemption import StopRequest
    from tsqlora_scale.training import warm_up_and_score

    folder = config.run_dir / "scores"
    with ExitStack() as stack:
        start = None if adapter is None else _opened(stack, adapter, checked)
        stop = stack.enter_context(StopRequest())
        lock = stack.enter_context(_only_writer(config, overwrite=overwrite, resume=place))
        run = build_run(checked, resume=place, adapter=start, stop=stop, lock=lock)
        warm_up_and_score(run, warm_up=adapter is None)
        if run.selector.table is None:
            raise UserError(f"there is nothing to show: sampling.selector={config.sampling.selector!r} keeps no table")
        summary: dict[str, Any] = {}
        files: list[Path | None] = []
        if run.is_main:
            summary = summarise_selector(
                run.selector,
                run.task,
                top=top,
                similarity=similarity,
                steps=run.step,
                seconds=run.record.seconds,
            )

        def write() -> None:
            files.append(run.write_scores(with_texts=True))  # again: where the pass could not, no checkpoint holds them
            write_summary(summary, config.run_dir)

        run.write_on_main(f"the scores, {str(folder)!r},", write)
    run.engine.close()
    return ScoreResult(folder, summary, files[0] if files else None)


def _opened(stack: ExitStack, adapter: str | Path, checked: Any) -> str:
    """The folder of a trained adapter that fits what has been checked, for as long as the stack is open.

    Raises:
        UserError: naming what does not fit.
    """
    from tsqlora_scale.model.adapters.adapter_type import check_sizes
    from tsqlora_scale.model.describe import check_adapter_fits
    from tsqlora_scale.run.trained_adapter import adapter_folder

    folder = stack.enter_context(adapter_folder(adapter))
    check_adapter_fits(checked.config, checked.model_config, str(folder))
    check_sizes(folder, checked.config.adapter)
    return str(folder)


def audit(
    config: Config, *, top: int = 5, similarity: float = 0.98, resume: bool = False, overwrite: bool = False
) -> AuditResult:
    """Which labels of a pool are probably wrong, every sample judged by models that have not seen it. A collective.

    Args:
        top: suspects of the result's list.
        similarity: cosine of two samples' features from which on they are nearly the same.
        resume: go on with an audit that was killed: folds that were finished are not trained again.
        overwrite: start anew where another run has been.

    Raises:
        UserError: as :func:`train`, or the config cannot be audited, or what is found cannot be written.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C has come; ``resume=True`` goes on.
    """
    prepare_environment()
    _check_options(top, similarity)
    from tsqlora_scale.audit.checks import check_audit, check_begun
    from tsqlora_scale.run import preflight

    check_audit(config)
    config = config.for_audit()
    place = "auto" if resume else None
    if resume and not overwrite:
        check_begun(config.run_dir)
    preflight.check_run_dir(config, overwrite=overwrite, resume=place)
    checked = preflight.check(config)
    from tsqlora_scale.audit.audit_run import audit_and_write
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.preemption import StopRequest

    with StopRequest() as stop, _only_writer(config, overwrite=overwrite, resume=place) as lock:
        run = build_run(checked, stop=stop, lock=lock)
        summary, suspects = audit_and_write(run, similarity=similarity, top=top, resume=resume)
    run.engine.close()
    return AuditResult(config.run_dir / "audit", summary, suspects)


def _check_options(top: int, similarity: float) -> None:
    if top < 1:
        raise UserError(f"--top {top} (top): must be 1 or more")
    if not 0 < similarity <= 1:
        raise UserError(f"--similarity {similarity:g} (similarity): must be above 0 and at most 1")


def _only_writer(config: Config, *, overwrite: bool, resume: str | None) -> RunLock:
    """The lock of the folders that a run writes into, whose checks are made again once it is held."""
    from tsqlora_scale.run import preflight
    from tsqlora_scale.run.run_lock import RunLock

    folders = [config.run_dir, *(before.run_dir for before in config.runs_before)]
    return RunLock(folders, lambda: preflight.check_run_dir(config, overwrite=overwrite, resume=resume))


def _for_scoring(config: Config, adapter: str | Path | None) -> Config:
    """The config of a run that warms up and scores: nothing else happens meanwhile.

    Raises:
        UserError: the config scores nothing, or not by this model, or not without training; or not by the adapter.
    """
    if config.scoring.proxy_model is not None:
        raise UserError(
            f"scoring.proxy_model={config.scoring.proxy_model!r} is for training; to score with it, set "
            "model.name_or_path to it and scoring.proxy_model=null"
        )
    if config.sampling.selector in BLIND_SELECTORS:
        kind = config.adapter.type
        remedy = "set it to 'quality'"
        if not ADAPTER_TRAITS[kind].scored:
            remedy = f"and adapter.type={kind!r} has no gradients by sample; set adapter.type=lora, and it to 'quality'"
        raise UserError(f"there is nothing to score: sampling.selector is {config.sampling.selector!r}; {remedy}")
    if config.scores_online:
        raise UserError(
            "scoring.source='online' scores while it trains, and leaves the scores in the run folder; "
            "to score without training set scoring.source=pass"
        )
    if adapter is not None and config.looks_before_training:
        raise UserError(
            f"--adapter {str(adapter)!r} (adapter): sampling.selector={config.sampling.selector!r} looks at the base "
            "alone, without any adapter; leave it out"
        )
    if adapter is not None and config.sampling.selector == "less" and config.sampling.less_gradients == "adam":
        raise UserError(
            f"--adapter {str(adapter)!r} (adapter): sampling.less_gradients='adam' takes the optimizer's moments, "
            "which no adapter's folder has; leave it out, or set sampling.less_gradients=plain"
        )
    return config.for_scoring()


def evaluate(config: Config, adapter: str | Path) -> dict[str, float]:
    """Metrics of a saved adapter on the config's held-out set; the training file need not be there. A collective.

    Args:
        adapter: an adapter's folder, a run folder or a checkpoint.

    Raises:
        UserError: naming the key, the file or the tensor.
    """
    prepare_environment()
    from tsqlora_scale.run import preflight
    from tsqlora_scale.run.labels_of_run import with_labels_of
    from tsqlora_scale.run.trained_adapter import adapter_folder

    config = with_labels_of(config, Path(adapter))
    with adapter_folder(adapter) as folder:
        checked = preflight.check_evaluation(config, folder)
        from tsqlora_scale.run.build import evaluate_adapter

        return evaluate_adapter(checked, str(folder))


def predict(
    data: str | Path,
    out: str | Path,
    *,
    run: str | Path | None = None,
    adapter: str | Path | None = None,
    config: Config | None = None,
    overwrite: bool = False,
) -> PredictResult:
    """Answer new rows by a saved adapter: a class and the probability of each, a number, or a text. A collective.

    Args:
        data: csv, tsv, jsonl or parquet with the columns of text that the config names; labels and targets need not be
            there. All its columns are written out again as they are, in order.
        out: the file to write, of any of these formats, by its suffix; whole or not at all. Beside the file's own
            columns it has ``prediction``, and ``probability_NAME`` of every class.
        run: a run folder, for its ``config.yaml`` and its ``adapter/``.
        adapter: an adapter's folder, or a checkpoint, in the place of the run's.
        config: of the run, in the place of its ``config.yaml``; without one it is looked for beside the adapter.
        overwrite: replace what is there.

    Raises:
        UserError: naming the option, the key, the file and the row, or the tensor.
    """
    prepare_environment()
    from tsqlora_scale.run.prediction_place import check_files, find_adapter, find_config

    place = find_adapter(run, adapter)
    config = config or find_config(run, place)
    check_files(Path(data), Path(out), overwrite=overwrite)
    from tsqlora_scale.run.labels_of_run import with_labels_of
    from tsqlora_scale.run.prediction_run import check_prediction, predict_file
    from tsqlora_scale.run.trained_adapter import adapter_folder

    config = with_labels_of(config, place)
    with adapter_folder(place) as folder:
        request = check_prediction(config, folder, Path(data), Path(out))
        return PredictResult(Path(out), len(request.filled), predict_file(request))
