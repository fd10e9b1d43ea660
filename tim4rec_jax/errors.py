"""How a user's mistake reaches the user: one sentence, a non-zero exit, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right; its message names the thing and the remedy."""


def _fail(message: object, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def run_main(main: Callable[[], int | None]) -> int:
    """Runs an entry point and turns what the user can put right into one sentence.

    Args:
      main: the entry point; returns an exit code, or None for 0.

    Returns:
      The exit code: `main`'s own, 1 after a `UserError` or an operating-system error
      (full disk, no permission), 130 after Ctrl-C. Anything else is a bug and keeps
      its traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away (`... | head`): not an error of ours, and
        # the interpreter must not try to flush the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
