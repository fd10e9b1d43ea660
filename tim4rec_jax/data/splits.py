"""Which events train, which validate, which test, and what training sees of a dataset."""

import datetime
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

# ---- data.splits
# Which events train, which validate, which test.


Split = Literal["valid", "test"]


class Splits(NamedTuple):
    """Each user's share in training, validation and test, as numbers of events from 0.

    Attributes:
      train: training sees the first so many events.
      valid: the event to predict from those before it; 0: none, as nothing is before it.
      test: likewise.
    """

    train: Int64[np.ndarray, "n_users"]
    valid: Int64[np.ndarray, "n_users"]
    test: Int64[np.ndarray, "n_users"]


def leave_one_out(lengths: Int64[np.ndarray, "n_users"]) -> Splits:
    """The paper's: the last event tests, the one before validates, the others train.

    It leaks the future: the model has trained on events of other users that come after a test
    event, and so knows what will be in fashion.
    """
    before_valid = np.maximum(lengths - 2, 0)
    return Splits(before_valid, before_valid, np.maximum(lengths - 1, 0))


def by_time(
    times: Int64[np.ndarray, "n_events"],
    offsets: Int64[np.ndarray, "n_users_and_1"],
    valid_from: int,
    test_from: int,
) -> Splits:
    """Nothing after `valid_from` trains; a user's next event after each date is predicted.

    Args:
      times: of all events, user after user.
      offsets: the events of user u are numbers `offsets[u]` to `offsets[u + 1]`.
      valid_from: first moment of validation, in the unit of `times`.
      test_from: first moment of the test.

    Returns:
      Splits without a validation target where a user has no event between the two dates, without
      a test target where none comes later, and without either where no event is before it.
    """
    train, until_test = (_events_before(times, offsets, cut) for cut in (valid_from, test_from))
    lengths = np.diff(offsets)
    return Splits(
        train, np.where(train < until_test, train, 0), np.where(until_test < lengths, until_test, 0)
    )


def _events_before(times, offsets, cut) -> np.ndarray:
    """Events of each user before the first one at `cut` or later."""
    late = np.flatnonzero(times >= cut)
    # Users without a late event find the first one of a later user, or none.
    first = np.append(late, len(times))[np.searchsorted(late, offsets[:-1])]
    return np.minimum(first, offsets[1:]) - offsets[:-1]


def moment(text: str) -> int:
    """Seconds since 1970 of an ISO date or time (UTC where it names no zone), or of a number.

    Raises:
      ValueError: it is neither.
    """
    try:
        return int(text)
    except ValueError:
        date = datetime.datetime.fromisoformat(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        return int(date.timestamp())


def date(moment: int) -> str:
    """An ISO date and time of seconds since 1970, as `moment` reads it; the number if too far."""
    try:
        return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return str(moment)
