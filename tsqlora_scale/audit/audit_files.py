"""What an audit leaves: a table of the whole pool, a list of fixes, a summary, and a page to walk through."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from tsqlora_scale.audit.findings import Findings
from tsqlora_scale.audit.page import write_page
from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.files import written_whole
from tsqlora_scale.common.printing import printable
from tsqlora_scale.tasks import Task

#: samples of a row group, with their texts
ROWS = 2**14
FIX_COLUMNS = ("id", "text", "label", "suggested_label", "reason", "probability")


def write_audit(findings: Findings, task: Task, folder: Path, *, title: str, top: int) -> None:
    """Write ``audit.parquet``, ``audit.csv``, ``fixes.csv``, ``summary.json`` and ``index.html``, each whole or not.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = audit_tables(findings, task)
    first = next(parts)
    with (
        written_whole(folder / "audit.parquet") as columns,
        written_whole(folder / "audit.csv") as lines,
        pq.ParquetWriter(columns, first.schema) as writer,
        pc.CSVWriter(lines, first.schema) as commas,
    ):
        for table in (first, *parts):
            writer.write_table(table, row_group_size=max(len(table), 1))
            commas.write_table(table)
    write_fixes(findings, task, folder / "fixes.csv")
    with written_whole(folder / "summary.json") as partial:
        partial.write_text(json.dumps(findings.summary(), indent=1) + "\n", encoding="utf-8")
    with written_whole(folder / "index.html") as partial:
        write_page(partial, findings, task, title=title, top=top)


def audit_tables(findings: Findings, task: Task) -> Iterator[pa.Table]:
    """The pool in its order, block by block: ``sample_id``, the data's own columns, and ours, called ``audit_…``.

    As the pool of a config (``id_column: sample_id``, ``weight: audit_weight``) it draws suspect samples less often,
    beside what ``task.dataset.weight`` says of them.
    """
    own = task.row_weights()
    places, ranks = np.empty(len(findings), dtype=np.int64), findings.ranks()
    places[findings.order()] = np.arange(1, len(findings) + 1)
    sizes = np.bincount(findings.first, minlength=len(findings))[findings.first]
    for block in blocks(len(findings), ROWS):
        given = task.given(block)
        ids = [str(name) for name in findings.ids[block]]
        kept = [name for name in given.column_names if name != "sample_id"]
        columns: dict[str, pa.Array] = {"sample_id": pa.array(ids, pa.string())}
        columns |= {name: given.column(name).combine_chunks() for name in kept}
        columns["audit_rank"] = pa.array(places[block])
        columns["audit_rank_in_label"] = pa.array(ranks[block])
        columns["audit_suspicion"] = pa.array(np.round(findings.suspicion[block], 6))
        if findings.wrong is not None:
            wrong = np.round(findings.wrong[block], 6)
            columns["audit_probability"] = pa.array(wrong)
            columns["audit_weight"] = pa.array(np.maximum(1 - wrong, 1e-6) * (1.0 if own is None else own[block]))
        if findings.suggested is not None:
            numbers = range(block.start, block.stop)
            columns["audit_suggested"] = pa.array([findings.suggestion(i) for i in numbers], pa.string())
        if findings.off_query is not None:
            columns["audit_off_query"] = pa.array(np.round(findings.off_query[block], 6))
        columns["audit_copies"] = pa.array(sizes[block] - 1)
        leaders = [str(findings.ids[i]) for i in findings.first[block].tolist()]
        columns["audit_copy_of"] = pa.array(
            [leader if size > 1 else None for leader, size in zip(leaders, sizes[block], strict=True)], pa.string()
        )
        yield pa.table(columns)


def write_fixes(findings: Findings, task: Task, path: Path) -> None:
    """The samples that :meth:`.Findings.fixes` lists, as csv with the columns :data:`FIX_COLUMNS`."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIX_COLUMNS)
        for place, reason in findings.fixes():
            wrong = "" if findings.wrong is None else f"{findings.wrong[place]:.4f}"
            suggestion = findings.suggestion(place) if "probably wrong" in reason else ""
            texts = (printable(text) for text in (task.preview(place), task.answer(place)))  # no NUL: it is read again
            writer.writerow([findings.ids[place], *texts, suggestion, reason, wrong])
