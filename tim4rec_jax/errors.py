"""How mistakes reach the user: as one sentence and an exit code, without a traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can correct. The message names the mistake and the remedy."""


def run_main(main: Callable[[], int | None]) -> int:
    """Runs the main function of a command and reports what the user can correct.

    Args:
      main: returns an exit code, or None for 0.

    Returns:
      The exit code. It is 1 after a `UserError` or an error of the operating system (full disk,
      no permission), 130 after Ctrl-C, and otherwise that of `main`. All other exceptions are
      bugs and keep their traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The program that reads our output has ended (`... | head`), which is no error. Python
        # flushes the output at exit and must not find the closed pipe then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
