"""The one exception that is meant for people."""


class EdgekvError(Exception):
    """A failure the user can act on.

    The message is one line: it names the file or the flag and says what to do. The command line prints it as
    ``edgekv: error: ...`` without a traceback.
    """
