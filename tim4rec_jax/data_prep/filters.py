"""Filters events in SQL over tables on disk, and counts what each step leaves.

DuckDB and Spark both run this SQL (see `engine`).
"""

import dataclasses
import datetime

from tim4rec_jax.data_prep.database import quote_name
from tim4rec_jax.data_prep.engine import Engine, Reading
from tim4rec_jax.data_prep.read import UNREADABLE
from tim4rec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Filters:
    """Says which events to keep. Filters are applied in the order of the fields, as in RecBole.

    Attributes:
      deduplicate: `exact` keeps one of several events with the same user, item and time; `first`
        or `last` keeps that one event of each user and item.
      min_rating: lowest rating kept.
      since: the first moment that is kept.
      until: the first moment that is not kept any more.
      k_core: the smallest number of events of each remaining user and item.
    """

    deduplicate: str | None = None
    min_rating: float | None = None
    since: datetime.datetime | None = None
    until: datetime.datetime | None = None
    k_core: int = 5


@dataclasses.dataclass(frozen=True)
class Step:
    """Counts after one step; users and items are None before the rows are checked."""

    step: str
    events: int
    users: int | None = None
    items: int | None = None


def apply(
    engine: Engine, filters: Filters, reading: Reading, *, where: str | None = None
) -> list[Step]:
    """Turns the rows that were read into the table `events` with the kept events.

    Its columns are the source row, user, item, time and rating. `user` and `item` are numbers, the
    keys of the tables `users` and `items`.

    Args:
      engine: holds the rows.
      filters: what to keep.
      reading: what was read.
      where: the condition that rows met; named in the report.

    Raises:
      UserError: no event is left. The message names the step that removed the last one, or what is
        wrong with most rows.
    """
    if reading.bad and not reading.good and (reading.kept or not reading.rows):
        [(reason, count)] = reading.bad.most_common(1)
        raise UserError(
            f"all rows are bad, and none is left: for {count:,} of {reading.bad.total():,}, "
            f"{reason}; check the file, its columns and its unit of time (--time-unit)"
        )
    unreadable = reading.bad[UNREADABLE]
    _number_ids(engine)
    counts = {"rows in the source": reading.rows + unreadable}
    if where:
        counts[f"where {where}"] = reading.kept + unreadable
    if reading.good < reading.kept + unreadable:
        counts["bad rows skipped"] = reading.good
    steps = [Step(step, events) for step, events in counts.items()]
    steps[-1] = _count(engine, steps[-1].step)
    _refuse_empty(steps)
    for step, condition in _conditions(filters):
        engine.create(
            "events",
            f'SELECT "row", "user", item, time, rating FROM (SELECT *, {condition} AS good '
            "FROM events) AS judged WHERE good",
        )
        steps.append(_count(engine, step))
        _refuse_empty(steps)
    if filters.k_core > 1:
        _k_core(engine, filters.k_core)
        steps.append(_count(engine, f"{filters.k_core}-core"))
        _refuse_empty(steps)
    return steps


def _number_ids(engine: Engine) -> None:
    for column in ("user", "item"):
        engine.create(
            f"{column}s",
            f"SELECT id, {engine.number} AS number "
            f"FROM (SELECT DISTINCT {quote_name(column)} AS id FROM {engine.good} AS good) AS ids",
        )
    engine.create(
        "events",
        'SELECT "row", users.number AS "user", items.number AS item, time, rating '
        f'FROM {engine.good} AS good JOIN users ON good."user" = users.id '
        "JOIN items ON good.item = items.id",
    )
    engine.drop("raw")


def _conditions(filters: Filters) -> list[tuple[str, str]]:
    """Returns the name of each step and the SQL condition that its kept events meet."""
    first = "row_number() OVER (PARTITION BY {} ORDER BY {}) = 1"
    unique = {
        "exact": first.format('"user", item, time', '"row"'),
        "first": first.format('"user", item', 'time, "row"'),
        "last": first.format('"user", item', 'time DESC, "row" DESC'),
    }
    steps = []
    if filters.deduplicate:
        steps.append((f"duplicates ({filters.deduplicate})", unique[filters.deduplicate]))
    if filters.min_rating is not None:
        steps.append((f"rating >= {filters.min_rating:g}", f"rating >= {filters.min_rating}"))
    for word, sign, moment in (("since", ">=", filters.since), ("until", "<", filters.until)):
        if moment:
            steps.append((f"{word} {moment}", f"time {sign} {_nanoseconds(moment)}"))
    return steps


def _nanoseconds(moment: datetime.datetime) -> int:
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return since // datetime.timedelta(microseconds=1) * 1000


def _k_core(engine: Engine, k: int) -> None:
    """Removes users and items with fewer than k events until each remaining one has k.

    A round looks only for the events of users and items that the round before made too few, and
    lowers the numbers of events of others by those. The table is rewritten when half of it is gone,
    and at the end, so that all of its copies together are no larger than three tables.
    """
    for column in ("user", "item"):
        engine.create(f"{column}_counts", _counted(column, "events"))
    rows = left = _events(engine, "events")
    few = "SELECT number FROM {0}_counts WHERE events < {1}"
    known = "SELECT number FROM {0}_counts"
    while True:
        # What a removed user has left of items that were removed before has been counted already.
        engine.create(
            "lost",
            'SELECT "user", item FROM events '
            f'WHERE ("user" IN ({few.format("user", k)}) OR item IN ({few.format("item", k)})) '
            f'AND "user" IN ({known.format("user")}) AND item IN ({known.format("item")})',
        )
        lost = _events(engine, "lost")
        if not lost:
            break
        left -= lost
        for column in ("user", "item"):
            engine.create(
                f"{column}_counts",
                "SELECT number, counts.events - coalesce(gone.events, 0) AS events "
                f"FROM {column}_counts AS counts "
                f"LEFT JOIN ({_counted(column, 'lost')}) AS gone USING (number) "
                f"WHERE counts.events >= {k}",
            )
        if 2 * left <= rows:
            _keep_known(engine)
            rows = left
    if left < rows:
        _keep_known(engine)
    engine.drop("lost", "user_counts", "item_counts")


def _counted(column: str, table: str) -> str:
    name = quote_name(column)
    return f"SELECT {name} AS number, count(*) AS events FROM {table} GROUP BY {name}"


def _keep_known(engine: Engine) -> None:
    engine.create(
        "events",
        'SELECT * FROM events WHERE "user" IN (SELECT number FROM user_counts) '
        "AND item IN (SELECT number FROM item_counts)",
    )


def _events(engine: Engine, table: str) -> int:
    return engine.rows(f"SELECT count(*) FROM {table}")[0][0]


def _count(engine: Engine, step: str) -> Step:
    counts = engine.rows(
        'SELECT count(*), count(DISTINCT "user"), count(DISTINCT item) FROM events'
    )[0]
    return Step(step, *counts)


def _refuse_empty(steps: list[Step]) -> None:
    if steps[-1].events:
        return
    before = f" of {steps[-2].events:,}" if len(steps) > 1 else ""
    raise UserError(
        f"nothing is left of the source: the step '{steps[-1].step}' leaves no event{before}; "
        "check the file and loosen the filters (--k-core, --min-rating, --since, --until, --where)"
    )
