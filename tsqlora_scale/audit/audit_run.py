"""An audit with a run folder around it."""

from __future__ import annotations

import shutil
from typing import Any

from tsqlora_scale.audit.audit_files import write_audit
from tsqlora_scale.audit.auditor import audit_pool
from tsqlora_scale.audit.findings import Findings
from tsqlora_scale.audit.page import LISTED
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks import Task

#: Where finished folds are kept in the run folder while an audit runs. It is none of what a new run wipes away.
PARTS = "audit-parts"


def audit_and_write(
    run: Run, *, similarity: float, top: int, resume: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Audit a run's pool and write what is found to ``audit/``; the summary and the most suspect samples.

    A collective; both are empty on other ranks than 0.

    Raises:
        UserError: as :func:`.audit_pool`, or what is found cannot be written.
        Stopped: on every rank.
    """
    parts, folder = run.record.folder / PARTS, run.record.folder / "audit"
    if run.is_main and not resume:
        shutil.rmtree(parts, ignore_errors=True)
    findings = audit_pool(run, similarity=similarity, parts=parts)

    def write() -> None:
        assert findings is not None
        write_audit(findings, run.task, folder, title=run.config.run.name, top=LISTED)
        shutil.rmtree(parts, ignore_errors=True)

    run.write_on_main(f"the audit, {str(folder)!r},", write)
    if findings is None:
        return {}, []
    return findings.summary(), [suspect(findings, run.task, int(place)) for place in findings.order()[:top]]


def suspect(findings: Findings, task: Task, place: int) -> dict[str, Any]:
    """A sample for a reader."""
    return {
        "sample_id": str(findings.ids[place]),
        "text": task.preview(place),
        "label": task.answer(place),
        "suggested": findings.suggestion(place),
        "suspicion": round(float(findings.suspicion[place]), 4),
        "probability": None if findings.wrong is None else round(float(findings.wrong[place]), 4),
    }
