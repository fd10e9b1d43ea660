"""Texts such as original ids, kept in Arrow, and where each id stands.

A Python list and a dictionary of ten million ids take two gigabytes. Here an id takes its bytes, a
hash of 8 bytes and a number of 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32, UInt64

# Two odd numbers that mix bits well: 2^64 divided by the golden ratio, and one of SplitMix64.
_STEP, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_CHUNK = 1 << 20  # texts that are hashed at once, which bounds the memory for that
_RECENT = 1 << 17  # ids whose place is kept in a dictionary


class Texts(Sequence[Any]):
    """A list of texts, or of texts and None, that an Arrow array holds.

    Attributes:
      array: the Arrow array.
    """

    def __init__(self, column: pa.ChunkedArray | pa.Array):
        """Takes an array of the type string."""
        # Of an array with many chunks, Arrow looks for the right one each time.
        self.array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self.array[number].as_py() for number in range(len(self))[place]]
        return self.array[int(place)].as_py()

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _CHUNK):
            yield from self.array.slice(first, _CHUNK).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return self.array if type is None else self.array.cast(type)


class IdIndex:
    """Finds the places of ids in Arrow arrays, one after the other: those of shards, for example.

    It keeps the hash of each id, in rising order, and the place of each hash. The arrays are hashed
    one at a time. An id is compared with the text that it is found at, so that equal hashes do
    not matter.
    """

    def __init__(self, column: pa.ChunkedArray | pa.Array):
        """Takes ids of the type string, none twice and none null."""
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        ends = np.cumsum([0, *map(len, self._chunks)])
        self._starts, hashes = ends[:-1], np.empty(ends[-1], np.uint64)
        for chunk, start in zip(self._chunks, self._starts, strict=True):
            for first in range(0, len(chunk), _CHUNK):
                part = chunk.slice(first, _CHUNK)
                hashes[start + first : start + first + len(part)] = hash_texts(part)
        places = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes, self._places = hashes[places], places
        self._recent: dict[str, int] = {}

    def find(self, ids: Sequence[str]) -> Int32[np.ndarray, " ids"]:
        """The place of each id, -1 for one that is not there."""
        recent = self._recent
        found = [recent.get(text) for text in ids]
        if None in found:
            unknown = list(
                dict.fromkeys(t for t, place in zip(ids, found, strict=True) if place is None)
            )
            looked_up = dict(zip(unknown, self._look_up(unknown).tolist(), strict=True))
            if len(recent) + len(looked_up) > _RECENT:
                recent.clear()
            # Only what is there: strangers could fill the dictionary with ids of any length.
            recent |= dict(
                [(text, place) for text, place in looked_up.items() if place >= 0][:_RECENT]
            )
            found = [looked_up[t] if p is None else p for t, p in zip(ids, found, strict=True)]
        return np.array(found, np.int32)

    def _look_up(self, ids: list[str]) -> Int32[np.ndarray, " ids"]:
        # What is no UTF-8, a lone surrogate, is not among ids either.
        texts = pa.array([text.encode("utf-8", "replace") for text in ids], pa.binary())
        hashes = hash_texts(texts)
        found = np.full(len(ids), -1, np.int32)
        at, left = np.searchsorted(self._hashes, hashes), np.arange(len(ids))
        while left.size:
            inside = at[left] < len(self._hashes)
            left = left[inside]
            left = left[self._hashes[at[left]] == hashes[left]]
            if not left.size:
                break
            places = self._places[at[left]]
            same = self._equal(places, texts.take(pa.array(left)))
            found[left[same]] = places[same]
            left = left[~same]
            at[left] += 1
        return found

    def _equal(self, places: Int32[np.ndarray, " n"], texts: pa.Array) -> Bool[np.ndarray, " n"]:
        """Whether the ids at some places are these texts."""
        same = np.zeros(len(places), bool)
        chunk_of = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(chunk_of):
            here = np.flatnonzero(chunk_of == number)
            stored = self._chunks[number].take(pa.array(places[here] - self._starts[number]))
            pair = [stored.cast(pa.binary()), texts.take(pa.array(here))]
            same[here] = pc.call_function("equal", pair).to_numpy(zero_copy_only=False)
        return same


def hash_texts(texts: pa.Array) -> UInt64[np.ndarray, " texts"]:
    """A hash of the bytes of each text, the same in every process."""
    lengths = pc.call_function("binary_length", [texts]).to_numpy(zero_copy_only=False)
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts)]
    letters = np.frombuffer(data or b"\0", np.uint8)
    hashes = lengths.astype(np.uint64)
    left = np.flatnonzero(lengths)
    for place in range(int(lengths.max(initial=0))):
        left = left[lengths[left] > place]
        hashes[left] = _mixed(hashes[left] ^ letters[starts[left] + place])
    return hashes


def _mixed(hashes: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    hashes = hashes * _STEP
    return (hashes ^ (hashes >> np.uint64(29))) * _MIX
