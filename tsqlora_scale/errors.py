"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the key or the file, the value, and the remedy. The command line prints it
    as one line and ends with exit code 2; it never ends in a traceback.
    """
