"""The request for advice: checks, and then the look."""

from __future__ import annotations

from typing import Literal

from tsqlora_scale.advice.advice_result import AdviceResult
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.schema import Config

#: Steps of every training of ``pilot="adapters"``.
STEPS = 60


def advise(
    config: Config, *, rows: int = 2000, pilot: Literal["heads", "adapters"] = "heads", steps: int | None = None
) -> AdviceResult:
    """Whether a choice among the pool's data would pay, before a run is paid for. A collective, under a launcher.

    Looks once at a random part of the pool and at all of ``task.query`` through the frozen base. What a choice by the
    query would gain is tried on query rows that had no part in it. Nothing but ``advice/advice.json`` of the run folder
    is written; a run that lies there stays as it is.

    Args:
        rows: of the pool that are looked at.
        pilot: what is trained for the trials: ``heads`` on frozen features, in closed form, or the config's own
            ``adapters``, for some steps: eight trainings.
        steps: of each of these; 60 if not given.

    Raises:
        UserError: as ``train``, or an option does not fit the config, or the pool is too small to say anything of.
    """
    prepare_environment()
    from tsqlora_scale.advice.advice_checks import check_pool, check_request
    from tsqlora_scale.advice.advised_config import config_of_look
    from tsqlora_scale.run import preflight

    check_request(config, rows=rows, pilot=pilot, steps=steps)
    looked_at = config_of_look(config)
    preflight.check_run_dir(looked_at, overwrite=True, resume=None)
    folder = config.run_dir / "advice"
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{str(folder)!r} is no folder; advice is written into it: move it away, or choose another run.name"
        )
    checked = preflight.check(looked_at)
    check_pool(len(checked.task) - checked.task.query_rows)
    from tsqlora_scale.advice.advice_run import look_and_judge
    from tsqlora_scale.run.build import build_run

    run = build_run(checked, writes=False)
    result = look_and_judge(run, config, rows=rows, steps=(steps or STEPS) if pilot == "adapters" else None)
    run.engine.close()
    return result
