"""What the replay of a log asks a run, and how it counts the answers."""

import numpy as np
import pyarrow as pa

from benchmarks.daily import ANEW, Outcome, markdown, next_events
from tests.data.small_dataset import in_memory

NAMES = ["a", "b", "c", "d"]


def test_the_events_of_the_next_day():
    """Against a loop over users and events."""
    rng = np.random.default_rng(0)
    histories = [
        (rng.integers(1, 5, length, dtype=np.int32), np.sort(rng.integers(0, 100, length)))
        for length in (1, 5, 9, 2, 14)
    ]
    log = in_memory(histories, ids=NAMES, splits=(2, 4))
    known, since, until = ["d", "a", "c"], 30, 95
    expected, unknown = [], 0
    for items, times in histories:
        before = []
        for item, moment in zip(items, times, strict=True):
            name = NAMES[item - 1]
            if since <= moment < until and before:
                if name in known:
                    expected.append([*before, (known.index(name) + 1, moment)])
                unknown += name not in known
            if name in known:
                before.append((known.index(name) + 1, moment))
    assert len(expected) > 5
    assert unknown > 1

    questions, missed = next_events(log, pa.chunked_array([known]), since, until)
    assert missed == unknown
    (chunk,) = questions.chunks
    found = [
        list(zip(chunk.items[first:end], chunk.timestamps[first:end], strict=True))
        for first, end in zip(questions.offsets[:-1], questions.offsets[1:], strict=True)
    ]
    assert found == expected
    # Each question is the last event of its row.
    assert (questions.splits.test == questions.lengths - 1).all()
    assert questions.n_items == 3


def test_the_table():
    def outcome(day, arm, epochs, seconds, *ranks):
        return Outcome(day, arm, seconds, 1000 * day, np.array(ranks), {"epochs": epochs})

    # A training costs 3 s, and 1 s for each epoch of each thousand events.
    found = [
        outcome(1, ANEW, 20, 23.0, 5),
        outcome(2, ANEW, 20, 43.0, 1, 99),
        outcome(2, "epochs=2", 2, 7.0, 1, 1),
    ]
    table = markdown(found, [ANEW, "epochs=2"]).splitlines()
    assert table[2] == "| 2 | 0.5000 (43 s) | 1.0000 (7 s) | 2 |"
    assert table[3] == "| all events, ndcg@10 | 0.5000 (+0.0%) | 1.0000 (+100.0%) |  |"
    assert table[-2] == "| processor seconds | 43 (1.00) | 7 (0.16) |  |"
    assert table[-1] == "| the same, but 3 of each training | 40 (1.00) | 4 (0.10) |  |"
