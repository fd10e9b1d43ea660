"""How mistakes reach the user: as one sentence and an exit code, without a traceback."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# Errors of the operating system that another path or other permissions correct.
_OF_PATHS = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
LONGEST_SENTENCE = 300  # characters; a longer one loses its middle


class UserError(Exception):
    """A mistake that the user can correct. The message names the mistake and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """A command line that has a wrong flag, or lacks one."""

    exit_code = 2  # as usual on Unix


class ArgumentParser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, without the list of all flags before it."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UsageError`."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def run_main(main: Callable[[], int | None]) -> int:
    """Runs the main function of a command and reports what the user can correct.

    Args:
      main: returns an exit code, or None for 0.

    Returns:
      The exit code. It is 2 after a `UsageError`, 1 after any other `UserError`, an error of the
      operating system (full disk, no permission) or want of memory, 130 after Ctrl-C, and otherwise
      that of `main`. All other exceptions are bugs and keep their traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The program that reads our output has ended (`... | head`), which is no error. Python
        # flushes the output at exit and must not find the closed pipe then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("the memory does not suffice; free some, or ask for less")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; correct the path or its permissions" if error.errno in _OF_PATHS else ""
        return _fail(f"{where}{error.strerror or error}{remedy}")
    except ValueError as error:
        if "null byte" not in str(error):  # what Python says of such a path
            raise
        return _fail("a name holds a null byte; choose another")


def _fail(message: str, code: int = 1) -> int:
    print(one_line(f"error: {message}"), file=sys.stderr)
    return code


def one_line(text: str, length: int = LONGEST_SENTENCE) -> str:
    r"""Makes a text fit for one line of a terminal, whatever it quotes.

    Line ends, control characters and broken characters are shown as in Python (`\n`, `\x1b`). Of a
    long text the middle is left out: it begins with the place and ends with the remedy.

    Args:
      text: the text.
      length: the largest number of characters of the result.
    """
    if len(text) > 2 * length:  # escapes only make it longer
        text = f"{text[:length]}{text[-length:]}"
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    if len(shown) <= length:
        return shown
    half = (length - 1) // 2
    return f"{shown[:half]}…{shown[half - length + 1 :]}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
