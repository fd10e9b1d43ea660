"""Filters events in SQL over tables on disk, and counts what each step leaves."""

import dataclasses
import datetime

import duckdb

from tim4rec_jax.data_prep.database import quote_name
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
    con: duckdb.DuckDBPyConnection,
    filters: Filters,
    *,
    where: str | None = None,
    unreadable: int = 0,
) -> list[Step]:
    """Turns the table `raw` into the table `events` with the kept events.

    Its columns are the source row, user, item, time and rating. `user` and `item` are numbers, the
    keys of the tables `users` and `items`.

    Args:
      con: holds `raw`.
      filters: what to keep.
      where: the condition that filled `raw.kept`; named in the report.
      unreadable: number of rows of the source that are not in `raw`; counted in the report.

    Raises:
      UserError: no event is left. The message names the step that removed the last one.
    """
    rows, kept, good = con.execute(
        "SELECT count(kept), count(*) FILTER (kept), count(*) FILTER (kept AND problem IS NULL) "
        "FROM raw"
    ).fetchall()[0]
    _number_ids(con)
    reading = {"rows in the source": rows + unreadable}
    if where:
        reading[f"where {where}"] = kept + unreadable
    if good < kept + unreadable:
        reading["bad rows skipped"] = good
    steps = [Step(step, events) for step, events in reading.items()]
    steps[-1] = _count(con, steps[-1].step)
    _refuse_empty(steps)
    for step, condition in _conditions(filters):
        _keep(con, condition)
        steps.append(_count(con, step))
        _refuse_empty(steps)
    if filters.k_core > 1:
        _k_core(con, filters.k_core)
        steps.append(_count(con, f"{filters.k_core}-core"))
        _refuse_empty(steps)
    return steps


def _number_ids(con: duckdb.DuckDBPyConnection) -> None:
    good = "kept AND problem IS NULL"
    for column in ("user", "item"):
        con.execute(
            f"CREATE TABLE {column}s AS SELECT id, row_number() OVER () AS number "
            f"FROM (SELECT DISTINCT {quote_name(column)} AS id FROM raw WHERE {good})"
        )
    con.execute(
        'CREATE TABLE events AS SELECT raw.rowid AS "row", CAST(users.number AS INTEGER) AS "user",'
        " CAST(items.number AS INTEGER) AS item, time, rating FROM raw "
        'JOIN users ON raw."user" = users.id JOIN items ON raw.item = items.id '
        f"WHERE {good}"
    )
    con.execute("DROP TABLE raw")


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


def _keep(con: duckdb.DuckDBPyConnection, condition: str) -> None:
    con.execute(
        "CREATE TABLE kept AS SELECT * EXCLUDE (good) "
        f"FROM (SELECT *, {condition} AS good FROM events) WHERE good"
    )
    con.execute("DROP TABLE events; ALTER TABLE kept RENAME TO events")


def _k_core(con: duckdb.DuckDBPyConnection, k: int) -> None:
    """Removes users and items with fewer than k events until each remaining one has k.

    A round looks only for the events of users and items that the round before made too few, and
    lowers the numbers of events of others by those. The table is rewritten when half of it is gone,
    and at the end, so that all of its copies together are no larger than three tables.
    """
    for column in ("user", "item"):
        con.execute(
            f"CREATE TABLE {column}_counts AS SELECT {quote_name(column)} AS number, "
            f"count(*) AS events FROM events GROUP BY {quote_name(column)}"
        )
    rows = left = _events(con)
    few = "SELECT number FROM {0}_counts WHERE events < {1}"
    known = "SELECT number FROM {0}_counts"
    while True:
        # What a removed user has left of items that were removed before has been counted already.
        con.execute(
            'CREATE TABLE lost AS SELECT "user", item FROM events '
            f'WHERE ("user" IN ({few.format("user", k)}) OR item IN ({few.format("item", k)})) '
            f'AND "user" IN ({known.format("user")}) AND item IN ({known.format("item")})'
        )
        lost = con.execute("SELECT count(*) FROM lost").fetchall()[0][0]
        if not lost:
            break
        left -= lost
        for column in ("user", "item"):
            con.execute(
                f"CREATE TABLE kept AS SELECT number, counts.events - coalesce(gone.events, 0) "
                f"AS events FROM {column}_counts AS counts LEFT JOIN "
                f"(SELECT {quote_name(column)} AS number, count(*) AS events FROM lost "
                f"GROUP BY {quote_name(column)}) AS gone USING (number) WHERE counts.events >= {k}"
            )
            con.execute(f"DROP TABLE {column}_counts; ALTER TABLE kept RENAME TO {column}_counts")
        con.execute("DROP TABLE lost")
        if 2 * left <= rows:
            _keep_known(con)
            rows = left
    if left < rows:
        _keep_known(con)
    con.execute("DROP TABLE lost; DROP TABLE user_counts; DROP TABLE item_counts")


def _keep_known(con: duckdb.DuckDBPyConnection) -> None:
    con.execute(
        "CREATE TABLE kept AS SELECT * FROM events "
        'WHERE "user" IN (SELECT number FROM user_counts) '
        "AND item IN (SELECT number FROM item_counts)"
    )
    con.execute("DROP TABLE events; ALTER TABLE kept RENAME TO events")


def _events(con: duckdb.DuckDBPyConnection) -> int:
    return con.execute("SELECT count(*) FROM events").fetchall()[0][0]


def _count(con: duckdb.DuckDBPyConnection, step: str) -> Step:
    counts = con.execute(
        'SELECT count(*), count(DISTINCT "user"), count(DISTINCT item) FROM events'
    ).fetchall()[0]
    return Step(step, *counts)


def _refuse_empty(steps: list[Step]) -> None:
    if steps[-1].events:
        return
    before = f" of {steps[-2].events:,}" if len(steps) > 1 else ""
    raise UserError(
        f"nothing is left of the source: the step '{steps[-1].step}' leaves no event{before}; "
        "check the file and loosen the filters (--k-core, --min-rating, --since, --until, --where)"
    )
