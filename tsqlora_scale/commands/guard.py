"""From how a command ends to an exit code. A user's mistake is one line and exit code 2, on every rank."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

from tsqlora_scale.common.errors import Stopped, UserError
from tsqlora_scale.common.failures import fail, leave_group, let_others_speak, record_cause
from tsqlora_scale.common.launcher import launched_rank, launched_size, speaks_for_machine
from tsqlora_scale.common.printing import printable
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.common.streams import take_whatever_is_printed


def guard(command: Callable[[], None], *, resume: str = "--resume auto") -> int:
    """Run a command; a :class:`UserError` becomes one line on rank 0 and exit code 2 on every rank.

    Ctrl-C is exit code 130, with a checkpoint or without one; another request to stop is none of the command's faults.

    Args:
        resume: the option by which the command continues after it was asked to stop; empty where it needs none.
    """
    take_whatever_is_printed()
    prepare_environment()
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
            again = f" with {resume}" if resume else ""
            print(f"requeue: {printable(str(stopped))}; the same command{again} continues")
        code = 130 if stopped.interrupted else 0
    except Exception as error:
        if launched_size() == 1:
            raise
        fail(error)
    leave_group(code)
    return code
