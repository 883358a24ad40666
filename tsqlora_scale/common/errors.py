"""How a run ends early: by a mistake that a user can mend, or because it was asked to."""

from collections.abc import Iterator
from contextlib import contextmanager

from tsqlora_scale.common.printing import printable, shortened


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the key or the file, the value, and the remedy. The command line prints it
    as one line and ends with exit code 2; it never ends in a traceback. Whatever of a file or a name
    gets into the message, it is one line of bounded length without control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(shortened(message, 2000)), 2000))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Mistakes inside are those of ``what``, a key and its value: their messages begin with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


class Stopped(Exception):
    """A run has ended because it was asked to, and its state is on disk. Not a failure.

    Attributes:
        interrupted: it was asked by Ctrl-C. The command then ends with exit code 130, as programs do that Ctrl-C ends,
            so that a script does not go on with what is half done; otherwise with 0.
    """

    def __init__(self, message: str = "", *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted
