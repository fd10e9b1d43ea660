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
    def outcome(day, arm, seconds, *ranks):
        return Outcome(day, arm, seconds, np.array(ranks), {})

    found = [
        outcome(1, ANEW, 100.0, 5),
        outcome(2, ANEW, 90.0, 1, 99),
        outcome(2, "epochs=2", 9.0, 1, 1),
    ]
    table = markdown(found, [ANEW, "epochs=2"]).splitlines()
    assert table[2] == "| 2 | 0.5000 (90 s) | 1.0000 (9 s) | 2 |"
    assert table[3] == "| all events, ndcg@10 | 0.5000 (+0.0%) | 1.0000 (+100.0%) |  |"
    assert table[-1] == "| processor seconds | 90 (1.00) | 9 (0.10) |  |"
