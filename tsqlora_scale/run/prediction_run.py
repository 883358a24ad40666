"""A saved adapter's answers to the rows of a file, written beside them."""

from __future__ import annotations

import collections
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.schema import Config, TaskConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.report.prediction_file import answer_names, prediction_writer, writing
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.run.adapted_model import load_adapted
from tsqlora_scale.run.build import started
from tsqlora_scale.run.labels_of_run import with_labels_of
from tsqlora_scale.run.preflight import Described, check_machine, describe
from tsqlora_scale.tasks.prediction import Answers, predict_windows
from tsqlora_scale.tasks.rows.given_rows import given_names, given_tables
from tsqlora_scale.tasks.rows.readers import file_format
from tsqlora_scale.tasks.rows.unlabelled import load_unlabelled

log = logging.getLogger("tsqlora_scale")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A checked request for answers.

    Attributes:
        filled: rows with a text to be answered, (N,) bool.
    """

    described: Described
    adapter: Path
    data: Path
    out: Path
    filled: np.ndarray


def check_prediction(config: Config, adapter: Path, data: Path, out: Path) -> Prediction:
    """The checks before a saved adapter answers, of all that needs no weights.

    Raises:
        UserError: naming the key, the file or the tensor.
    """
    from tsqlora_scale.model.describe import check_adapter_fits

    check_machine(config)
    config = with_labels_of(config, adapter)
    rows = load_unlabelled(config.task, data)
    described = describe(config, rows.data)
    check_adapter_fits(described.config, described.model_config, adapter)
    names = answer_names(config.task.labels, probabilities=described.task.gives_probabilities)
    given = given_names(data, config.task)
    taken = next((name for name in given if name in names), None)
    if taken is not None:
        raise UserError(f"--data {str(data)!r}: has a column {taken!r}, the name of an answer's; rename it")
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--data {str(data)!r}: the column {twice!r} is there twice; rename one")
    if file_format(data) == "json" and out.suffix.lower() != ".jsonl":  # texts that no table holds: said now, not later
        collections.deque(given_tables(data, config.task), maxlen=0)
    return Prediction(described=described, adapter=adapter, data=data, out=out, filled=rows.filled)


def predict_file(request: Prediction) -> int:
    """Answer all rows; how many could not be answered, having no text. A collective; rank 0 writes.

    Raises:
        UserError: on every rank, when rank 0 cannot write.
    """
    described, filled = request.described, request.filled
    config, task = described.config, described.task
    accelerator = started(config, accumulation=1, trains=False)
    world = World.current(accelerator.device)
    model = load_adapted(described, request.adapter, device=accelerator.device)
    with contextlib.ExitStack() as stack, Progress("predicting", shows=world.is_main) as bar:
        writer = None
        with world.together(), writing(request.out):
            if world.is_main:
                writer = stack.enter_context(prediction_writer(request.out, request.data, config.task))
        windows = predict_windows(model, task, world, filled, batch_size=config.train.eval_batch_size, progress=bar)
        for window, answers in windows:
            with world.together(), writing(request.out):
                if writer is not None and answers is not None:
                    writer.write(answer_table(config.task, window, answers, task.gives_probabilities))
        with world.together(), writing(request.out):
            stack.close()
    empty = len(filled) - int(np.count_nonzero(filled))
    if empty and world.is_main:
        log.warning("%s: %d rows with an empty text have no answer", printable(str(request.data)), empty)
    return empty


def answer_table(cfg: TaskConfig, window: slice, answers: Answers, with_probabilities: bool) -> pa.Table:
    """The columns of the answers to a window's rows, null where a row has none."""
    size = window.stop - window.start
    kinds = {"classification": pa.int64(), "regression": pa.float32()}
    values, kind = answers.values, kinds.get(cfg.type, pa.string())
    if isinstance(cfg.labels, list) and cfg.type == "classification":
        values, kind = [cfg.labels[answer] for answer in values], pa.string()
    cells: list[object] = [None] * size
    for row, value in zip((answers.rows - window.start).tolist(), values, strict=True):
        cells[row] = value
    columns = [pa.array(cells, kind)]
    names = answer_names(cfg.labels, probabilities=with_probabilities)
    if with_probabilities:
        table = np.zeros((size, len(names) - 1), np.float32)
        missing = np.ones(size, bool)
        if answers.probabilities is not None:
            table[answers.rows - window.start] = answers.probabilities
            missing[answers.rows - window.start] = False
        columns += [pa.array(column, pa.float32(), mask=missing) for column in np.ascontiguousarray(table.T)]
    return pa.table(dict(zip(names, columns, strict=True)))
