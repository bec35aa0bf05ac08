"""The one exception for input that a user must mend."""


class InputError(ValueError):
    """Bad input: its message is one line that names the file, the entry and the remedy.

    The command line prints the message and exits with 2.
    """
