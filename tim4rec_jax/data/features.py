"""The features of items: how a prepared dataset keeps them, and the arrays that models take.

`item_features.arrow` is an Arrow IPC file with one row for each item, in the order of their
indices, and one column for each feature:

- A *categorical* feature is a list of values for each item, `list<dictionary<int32, string>>`. Its
  dictionary is the vocabulary, most frequent value first. An empty list stands for an item of which
  nothing is known: it has no value, or only values that too few items have.
- A *dense* feature is a vector for each item, `fixed_size_list<float32>`. Each component has mean 0
  and standard deviation 1 over the items that have the feature; the others have 0. The statistics
  are the JSON texts `mean` and `std` in the metadata of the field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, Int32, Int64

from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import check_file

FEATURES_FILE = "item_features.arrow"
_CODE_TYPE = pa.dictionary(pa.int32(), pa.string())
_LIST_TYPE = pa.list_(pa.field("item", _CODE_TYPE))


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A feature that is one or several of some words.

    Attributes:
      name: of the column.
      vocabulary: the values that count.
    """

    name: str
    vocabulary: tuple[str, ...]

    def encode(self, values: pa.ListArray) -> pa.ListArray:
        """The column of a features file.

        Args:
          values: a list of texts for each item. Values outside of the vocabulary are left out.
        """
        flat = values.flatten()
        known = pa.array(self.vocabulary, pa.string())
        codes = pc.call_function("index_in", [flat], pc.SetLookupOptions(known))
        row = np.repeat(np.arange(len(values)), list_lengths(values))
        kept = np.asarray(codes.is_valid())
        counts = np.bincount(row[kept], minlength=len(values))
        offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int32())
        found = pa.DictionaryArray.from_arrays(codes.drop_null().cast(pa.int32()), known)
        return pa.ListArray.from_arrays(offsets, found, type=_LIST_TYPE)

    @property
    def field(self) -> pa.Field:
        """The column's field."""
        return pa.field(self.name, _LIST_TYPE, nullable=False)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A feature that is a number or a vector.

    Attributes:
      name: of the column.
      mean: of each component.
      std: standard deviation of each component; 1 where it does not vary.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encode(self, values: Float[np.ndarray, "V n"]) -> pa.FixedSizeListArray:
        """The column of a features file.

        Args:
          values: a vector for each item, as in the source; NaN for an item without one.
        """
        scaled = np.nan_to_num((values - np.array(self.mean)) / np.array(self.std))
        scaled = np.clip(scaled, -1e6, 1e6).astype(np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(scaled.ravel()), type=self.field.type)

    @property
    def field(self) -> pa.Field:
        """The column's field, with the statistics."""
        kind = pa.list_(pa.field("item", pa.float32()), len(self.mean))
        statistics = {"mean": json.dumps(self.mean), "std": json.dumps(self.std)}
        return pa.field(self.name, kind, nullable=False, metadata=statistics)


Feature = Categorical | Dense


class FeatureTable:
    """The features of all items of a dataset.

    Attributes:
      table: the columns of a features file.
      features: what each column is.
    """

    def __init__(self, table: pa.Table):
        """Takes columns as `Categorical.encode` and `Dense.encode` make them.

        Raises:
          ValueError: they are something else; the message says what.
        """
        self.table = table.combine_chunks()
        self.features: tuple[Feature, ...] = tuple(map(self._feature, self.table.schema))

    @classmethod
    def encoded(cls, features: Sequence[Feature], columns: Mapping[str, Any]) -> FeatureTable:
        """Encodes columns, given as `encode` of their feature takes them."""
        arrays = [feature.encode(columns[feature.name]) for feature in features]
        schema = pa.schema([feature.field for feature in features])
        return cls(pa.Table.from_arrays(arrays, schema=schema))

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return ", ".join(
            f"{each.name} ({len(each.vocabulary):,} values)"
            if isinstance(each, Categorical)
            else f"{each.name} ({len(each.mean):,} number{'s' * (len(each.mean) > 1)})"
            for each in self.features
        )

    def columns(self) -> dict[str, Any]:
        """The columns as `encoded` takes them. Values that were left out are gone."""
        found: dict[str, Any] = {}
        for feature in self.features:
            column = self._array(feature.name)
            if isinstance(feature, Categorical):
                texts = column.values.dictionary_decode()
                found[feature.name] = pa.ListArray.from_arrays(column.offsets, texts)
            else:
                values = self._numbers(feature.name).astype(np.float64)
                found[feature.name] = values * np.array(feature.std) + np.array(feature.mean)
        return found

    def arrays(
        self,
    ) -> tuple[
        Int32[np.ndarray, "rows S"],
        Float32[np.ndarray, "rows S"],
        Float32[np.ndarray, "rows F"],
        int,
    ]:
        """What `tim4rec_jax.layers.items.FeatureArrays` holds; row 0 is for padding.

        The values of each categorical feature follow one another, the unknown value first. An item
        without a value has that one. An item with n values has each with the weight 1/n.

        Returns:
          Codes, weights, dense numbers, and the number of codes.
        """
        codes, weights, first = [], [], 1
        dense = [np.zeros((len(self), 0), np.float32)]
        for feature in self.features:
            if isinstance(feature, Dense):
                dense.append(self._numbers(feature.name))
                continue
            column = self._array(feature.name)
            lengths = np.diff(column.offsets.to_numpy())
            place = np.zeros((len(self), max(int(lengths.max(initial=1)), 1)), np.int32)
            weight = np.zeros(place.shape, np.float32)
            inside = np.arange(place.shape[1]) < lengths[:, None]
            place[inside] = column.flatten().indices.to_numpy() + first + 1
            weight[inside] = np.repeat(1 / np.maximum(lengths, 1), lengths)
            place[lengths == 0, 0], weight[lengths == 0, 0] = first, 1
            codes.append(place)
            weights.append(weight)
            first += len(feature.vocabulary) + 1
        codes = codes or [np.zeros((len(self), 0), np.int32)]
        weights = weights or [np.zeros((len(self), 0), np.float32)]

        def joined(parts: list[np.ndarray]) -> np.ndarray:
            return np.pad(np.concatenate(parts, axis=1), ((1, 0), (0, 0)))

        return joined(codes), joined(weights), joined(dense), first

    def digest(self) -> str:
        """A digest of fields, vocabularies and values."""
        digest = hashlib.sha256()
        for feature in self.features:
            column = self._array(feature.name)
            digest.update(json.dumps(dataclasses.astuple(feature)).encode())
            if isinstance(feature, Categorical):
                lengths = np.diff(column.offsets.to_numpy()).astype(np.int64)
                digest.update(lengths.tobytes() + column.flatten().indices.to_numpy().tobytes())
            else:
                digest.update(np.ascontiguousarray(self._numbers(feature.name)).tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Writes the file."""
        with pa.ipc.new_file(path, self.table.schema) as writer:
            writer.write_table(self.table)

    def _array(self, name: str) -> Any:
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _numbers(self, name: str) -> Float32[np.ndarray, "V n"]:
        column = self._array(name)
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)

    def _feature(self, field: pa.Field) -> Feature:
        column = self._array(field.name)
        if column.null_count or field.nullable:
            raise ValueError(f"the column {field.name!r} holds a null")
        if field.type == _LIST_TYPE:
            values = column.flatten()
            words = values.dictionary
            if values.null_count or words.null_count or len(words.unique()) < len(words):
                raise ValueError(f"the vocabulary of {field.name!r} is damaged")
            return Categorical(field.name, tuple(words.to_pylist()))
        if not (pa.types.is_fixed_size_list(field.type) and field.type.value_type == pa.float32()):
            raise ValueError(f"the column {field.name!r} has the type {field.type}")
        if column.flatten().null_count or not np.isfinite(self._numbers(field.name)).all():
            raise ValueError(f"the column {field.name!r} holds a number that is not finite")
        try:
            mean, std = (json.loads((field.metadata or {})[key]) for key in (b"mean", b"std"))
            sizes = {len(mean), len(std), field.type.list_size}
            good = len(sizes) == 1 and all(map(math.isfinite, mean + std)) and min(std) > 0
        except (KeyError, ValueError, TypeError):
            good, mean, std = False, (), ()
        if not good:
            raise ValueError(f"the statistics of {field.name!r} are damaged")
        return Dense(field.name, tuple(map(float, mean)), tuple(map(float, std)))


def list_lengths(values: Any) -> Int64[np.ndarray, " V"]:
    """Number of values in each list of an Arrow array; 0 for no list."""
    return pc.call_function("list_value_length", [values]).fill_null(0).to_numpy().astype(np.int64)


def read_features(directory: Path, n_items: int, remedy: str) -> FeatureTable | None:
    """Reads the features of a prepared dataset, or of a run.

    Args:
      directory: the folder.
      n_items: how many items it has.
      remedy: what to do about a damaged file.

    Returns:
      The features; None if there is no file.

    Raises:
      UserError: the file is damaged, or of another number of items.
    """
    path = directory / FEATURES_FILE
    if not path.exists():
        return None
    check_file(path, remedy)
    try:
        with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as reader:
            table = reader.read_all()
        table.validate(full=True)
        found = FeatureTable(table)
    except Exception as error:  # of a damaged file, Arrow can say anything
        raise UserError(
            f"{path} is damaged or incomplete ({first_line(error)}); {remedy}"
        ) from error
    if len(found) != n_items:
        raise UserError(f"{path}: {len(found):,} rows for {n_items:,} items; {remedy}")
    return found
