"""What of a config an audit cannot do, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config

#: What an audit has left in its run folder when it is killed, of what a run leaves; the last of them perhaps in part.
BEGUN = ("config.yaml", "metrics.jsonl", "ranks.jsonl", "audit")
#: What is written last.
LAST = Path("audit", "index.html")


def check_audit(config: Config) -> None:
    """Check that a config can be audited.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    if config.adapter.init_from is not None:
        raise UserError(
            f"adapter.init_from={config.adapter.init_from!r}: an audit begins anew, as an adapter may have learned "
            "from the very labels that it is to judge; set adapter.init_from=null"
        )
    task = config.task
    if config.adapter.starts_in_base and (config.audits_features or task.query is not None):
        raise UserError(
            f"adapter.init={config.adapter.init!r}: takes factors out of the base, whose own features an audit looks "
            "at; set adapter.init=default"
        )
    if task.objective is not None:
        raise UserError(f"task.objective={task.objective!r}: an audit knows the objectives of task.type alone")
    texts = task.type not in ("classification", "regression")
    if texts and config.scoring.audit in ("features", "both"):
        raise UserError(
            f"scoring.audit={config.scoring.audit!r}: features tell labels, and the answers of a {task.type} task are "
            "texts; set scoring.audit=adapters"
        )


def check_begun(folder: Path) -> None:
    """Check that a run folder holds nothing but an audit that was killed, where one is to go on.

    Raises:
        UserError: it holds a run, or an audit that was finished.
    """
    from tsqlora_scale.report.record import CONTENTS

    others = [Path(name) for name in CONTENTS if name not in BEGUN]
    found = next((name for name in (LAST, *others) if os.path.lexists(folder / name)), None)
    if found is not None:
        raise UserError(
            f"run folder {str(folder)!r} holds {found}, so no audit that was killed; choose another run.name, or give "
            "--overwrite in the place of --resume"
        )
