"""Which rows of the parameters of two runs stand for the same, and how new rows begin.

Rows stand for items, for users, for the values and numbers of item features, or for dates.
"""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int64

from tim4rec_jax.data.features import Categorical, FeatureTable

# A tree of arrays, as `nnx.to_pure_dict` returns it, by the place of each array in it.
Arrays = dict[str, np.ndarray]

VALUES, KERNEL, BIAS = (f"item_embedding/maps/{name}" for name in ("values", "kernel", "bias"))
# The spread of new rows, as a share of that of the rows they are drawn around.
_SPREAD = 0.01


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Which rows of a table stand for the same things in two runs.

    Attributes:
      size: number of entries of the run that is begun with.
      origin: for each entry of the new run, its number among those entries, or -1 if it is new.
      first: number of the row of the first entry. Rows before it and behind the last one (padding,
        BERT4Rec's mask) stay as they are.
    """

    size: int
    origin: Int64[np.ndarray, " entries"]
    first: int = 1

    @classmethod
    def matched(
        cls, old: pa.ChunkedArray | pa.Array, new: pa.ChunkedArray | pa.Array, first: int = 1
    ) -> "Vocabulary":
        """Matches ids."""
        found = pc.call_function("index_in", [new], pc.SetLookupOptions(old))
        return cls(len(old), pc.fill_null(found, -1).to_numpy().astype(np.int64), first)

    @property
    def kept(self) -> int:
        """Number of entries of both."""
        return int((self.origin >= 0).sum())

    def move(self, table: np.ndarray, axis: int, fill: Callable[..., np.ndarray]) -> np.ndarray:
        """The table of the new run.

        Args:
          table: that of the run that is begun with.
          axis: the axis of the rows.
          fill: makes the rows of new entries from all rows of the run, and their number.
        """
        table, end = np.moveaxis(table, axis, 0), self.first + self.size
        rows, known = table[self.first : end], self.origin >= 0
        moved = np.empty((len(known), *table.shape[1:]), table.dtype)
        moved[known] = rows[self.origin[known]]
        if not known.all():
            moved[~known] = fill(rows, int((~known).sum()))
        parts = [table[: self.first], moved, table[end:]]
        return np.moveaxis(np.concatenate(parts), 0, axis)


def new_rows(
    rows: Float32[np.ndarray, " V *shape"], count: int, rng: np.random.Generator
) -> Float32[np.ndarray, " {count} *shape"]:
    """The first rows of things that nothing has been learnt about.

    They are the mean of all rows: scores are dot products with these rows, so a new item begins
    with the mean of all scores, whatever the history. The same row is the item's input vector,
    where the mean says nothing but "some item". Around the mean, they are spread by a hundredth of
    the spread of all rows. With the very mean, all new items had the same score, and those that are
    not trained kept it: a target among them would take the best place of all. A spread as wide as
    that of an untrained model would order new items by chance, against trained ones too. The
    repeat bias is one number for all items, and is no part of any row.

    Args:
      rows: those that are known.
      count: number of rows to make.
      rng: draws the spread.
    """
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    noise = rng.standard_normal((count, *rows.shape[1:]), np.float32)
    return (mean + _SPREAD * spread * noise).astype(rows.dtype)


def zeros(rows: np.ndarray, count: int) -> np.ndarray:
    """New rows for `Vocabulary.move`: zeros."""
    return np.zeros((count, *rows.shape[1:]), rows.dtype)


def means(rows: np.ndarray, count: int) -> np.ndarray:
    """New rows for `Vocabulary.move`: the mean of those that are there."""
    mean = rows.mean(axis=0) if len(rows) else 0
    return np.broadcast_to(mean, (count, *rows.shape[1:]))


@dataclasses.dataclass(frozen=True)
class FeatureMatch:
    """How the item features of two runs match.

    Attributes:
      vocabularies: of the values of categorical features, and of the numbers of dense ones.
      old: mean and standard deviation with which each number of today was standardised in the run
        that is begun with; those of today if it is new.
      new: those of today.
    """

    vocabularies: dict[str, Vocabulary]
    old: Float64[np.ndarray, "2 F"]
    new: Float64[np.ndarray, "2 F"]

    @classmethod
    def matched(cls, old: FeatureTable, new: FeatureTable) -> "FeatureMatch":
        """Matches values and numbers by their names."""
        (values, numbers, statistics), (values_now, numbers_now, now) = map(
            _named_features, (old, new)
        )
        known = Vocabulary.matched(numbers, numbers_now, first=0)
        then = np.where(known.origin >= 0, statistics[:, known.origin] if known.size else now, now)
        return cls({"values": Vocabulary.matched(values, values_now), "numbers": known}, then, now)

    def keep_sums(self, params: Arrays) -> None:
        """Has the linear map give the same sums, although numbers are standardised in another way.

        A number x was (x - m) / s, and is now (x - n) / t. So its weight w becomes w t / s, and
        w (n - m) / s is added to the bias.

        Args:
          params: the parameters of the new run, changed in place.
        """
        if KERNEL not in params:  # there are no numbers
            return
        (m, s), (n, t), kernel = self.old, self.new, params[KERNEL]
        params[BIAS] = (params[BIAS] + ((n - m) / s) @ kernel).astype(kernel.dtype)
        params[KERNEL] = (kernel * (t / s)[:, None]).astype(kernel.dtype)


def _named_features(table: FeatureTable) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Names of all values and of all numbers, in the order of `FeatureMaps`; mean and deviation."""
    values, numbers, mean, std = [], [], [], []
    for feature in table.features:
        if isinstance(feature, Categorical):
            values += [json.dumps([feature.name, value]) for value in (None, *feature.vocabulary)]
        else:
            numbers += [json.dumps([feature.name, i]) for i in range(len(feature.mean))]
            mean, std = [*mean, *feature.mean], [*std, *feature.std]
    return (
        pa.array(values, pa.string()),
        pa.array(numbers, pa.string()),
        np.array([mean, std], np.float64).reshape(2, -1),
    )


def at_other_dates(vectors: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What a piecewise linear function with values at the dates `old` has at the dates `new`.

    It is constant before the first and after the last date, as the date bias is.
    """
    columns = [np.interp(new, old, column) for column in vectors.T]
    return np.stack(columns, axis=1).astype(vectors.dtype)
