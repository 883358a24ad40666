"""What of a config an audit cannot do, before anything is loaded."""

from __future__ import annotations

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config


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
    if task.objective is not None:
        raise UserError(f"task.objective={task.objective!r}: an audit knows the objectives of task.type alone")
    texts = task.type not in ("classification", "regression")
    if texts and config.scoring.audit in ("features", "both"):
        raise UserError(
            f"scoring.audit={config.scoring.audit!r}: features tell labels, and the answers of a {task.type} task are "
            "texts; set scoring.audit=adapters"
        )
