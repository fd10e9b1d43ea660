"""Which events of each user train, which one validates, and which one tests."""

import datetime
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

Split = Literal["valid", "test"]


class Splits(NamedTuple):
    """For each user, the numbers of the user's events (from 0) that train, validate and test.

    Attributes:
      train: training sees this many events, from the first one on.
      valid: the event that validation predicts from all events before it. 0 means none, because
        nothing is before the first event.
      test: the event that the test predicts, likewise.
    """

    train: Int64[np.ndarray, " n_users"]
    valid: Int64[np.ndarray, " n_users"]
    test: Int64[np.ndarray, " n_users"]


def leave_one_out(lengths: Int64[np.ndarray, " n_users"]) -> Splits:
    """The split of the paper: the last event tests, the one before validates, the others train.

    This split leaks the future. The model has trained on events of other users that come after a
    test event, and so it knows which items will be in fashion.

    Args:
      lengths: number of events of each user.
    """
    before_valid = np.maximum(lengths - 2, 0)
    return Splits(before_valid, before_valid, np.maximum(lengths - 1, 0))


def by_time(
    times: Int64[np.ndarray, " n_events"],
    offsets: Int64[np.ndarray, " n_users_and_1"],
    valid_from: int,
    test_from: int,
) -> Splits:
    """The split by two dates: each user's first event after a date is predicted.

    No event after `valid_from` trains.

    Args:
      times: times of all events, one user's after the other's.
      offsets: user u has the events `offsets[u]` to `offsets[u + 1]`, the last not included.
      valid_from: first moment of validation, in the unit of `times`.
      test_from: first moment of the test, in the unit of `times`.

    Returns:
      The splits. A user without an event between the two dates has no validation target. A user
      without an event after the second date has no test target. A user whose first event comes
      after a date has no target there.
    """
    train, until_test = (_events_before(times, offsets, cut) for cut in (valid_from, test_from))
    lengths = np.diff(offsets)
    return Splits(
        train, np.where(train < until_test, train, 0), np.where(until_test < lengths, until_test, 0)
    )


def _events_before(times, offsets, cut) -> np.ndarray:
    """Number of events of each user before the user's first one at `cut` or later."""
    late = np.flatnonzero(times >= cut)
    # For a user without a late event this finds an event of a later user, or the end.
    first = np.append(late, len(times))[np.searchsorted(late, offsets[:-1])]
    return np.minimum(first, offsets[1:]) - offsets[:-1]


def parse_time(text: str) -> int:
    """Seconds since 1970 of an ISO date or time (UTC unless it names a zone), or of a number.

    Raises:
      ValueError: the text is neither.
    """
    try:
        return int(text)
    except ValueError:
        date = datetime.datetime.fromisoformat(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        return int(date.timestamp())


def format_time(seconds: int) -> str:
    """The ISO date and time of seconds since 1970; the number itself if no calendar holds it."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return str(seconds)
