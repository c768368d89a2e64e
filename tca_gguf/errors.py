"""The one error type of the package."""


class TcaError(Exception):
    """Something the user can act on: one line that names the file, key or argument, and what to do.

    Every command prints it as `error: ...` and exits with code 1; a library caller may catch it. A bug of ours raises
    any other exception.
    """
