"""What can be found wrong with a request for advice before the model is loaded."""

from __future__ import annotations

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config

#: Fewer rows say nothing.
FEWEST = 20


def check_request(config: Config, *, rows: int, pilot: str, steps: int | None) -> None:
    """Check the options against the config.

    Raises:
        UserError: naming the option or key, its value and the remedy.
    """
    if rows < FEWEST:
        raise UserError(f"--rows {rows} (rows): must be {FEWEST} or more")
    if pilot not in ("heads", "adapters"):
        raise UserError(f"--pilot {pilot!r} (pilot): is none of 'heads', 'adapters'")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps} (steps): must be 1 or more")
    if steps is not None and pilot != "adapters":
        raise UserError(f"--steps {steps} (steps): is for --pilot adapters; give that, too, or leave it out")
    if pilot == "adapters" and config.task.query is None:
        raise UserError("--pilot adapters (pilot): is judged on the rows of task.query, which is not set; leave it out")
    if config.task.objective is not None:
        raise UserError(
            f"task.objective={config.task.objective!r}: advice knows the objectives of task.type alone; look with "
            "task.objective=null, if that is near enough"
        )
    if config.adapter.init_from is not None:
        raise UserError(
            f"adapter.init_from={config.adapter.init_from!r}: advice looks at the base as it is; set "
            "adapter.init_from=null"
        )
    if config.adapter.starts_in_base:
        raise UserError(
            f"adapter.init={config.adapter.init!r}: takes factors out of the base, at which advice looks; set "
            "adapter.init=default, which does not change what is seen"
        )


def check_pool(size: int) -> None:
    """Check that a pool has enough samples to say anything of.

    Raises:
        UserError: it has not.
    """
    if size < FEWEST:
        raise UserError(f"task.dataset: the pool has {size} rows, and advice needs {FEWEST} or more; train on all")
