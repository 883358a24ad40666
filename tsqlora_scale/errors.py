"""How a run ends early: by a mistake that a user can mend, or because it was asked to."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the key or the file, the value, and the remedy. The command line prints it
    as one line and ends with exit code 2; it never ends in a traceback.
    """


class Stopped(Exception):
    """A run has ended because it was asked to, and its state is on disk. Not a failure: exit code 0."""
