"""Recommends from a folder that `python -m tim4rec_jax.serving export` wrote.

python run_export.py DIR ITEM@TIME ITEM@TIME ... [--top 10] [--at TIME]

TIME is in whole seconds since 1970. The program needs jax, flatbuffers, numpy and pyarrow. It does
not need the package that trained the model.
"""

import argparse
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
from jax import export


def read_metadata(folder: Path) -> dict:
    """Reads metadata.json, and compares its digest and those of the other files."""

    def content(name: str) -> bytes:
        if not (folder / name).is_file():  # a pipe would keep us waiting
            raise ValueError(f"{name} is no file")
        return (folder / name).read_bytes()

    try:
        metadata = json.loads(content("metadata.json"))
        rest = {key: value for key, value in metadata.items() if key != "digest"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        # Exports of earlier versions do not have it.
        if metadata.get("digest", digest) != digest:
            raise ValueError("metadata.json is not what was exported")
        if metadata["gaps"] not in ("exact", "recbole"):
            raise ValueError("gaps of an unknown kind")
        for name, digest in metadata["files"].items():
            if hashlib.sha256(content(name)).hexdigest() != digest:
                raise ValueError(f"{name} is not the file that was exported")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(f"error: {folder} is damaged ({error}): export it again") from None
    return metadata


class Exported:
    """An exported folder, read into memory."""

    def __init__(self, folder: Path):
        self.metadata = read_metadata(folder)
        self.items = pq.read_table(folder / "items.parquet", columns=["item"])["item"]
        self.index = {item: i for i, item in enumerate(self.items.to_pylist(), start=1)}
        with np.load(folder / "weights.npz") as weights:
            self.weights = jax.device_put(dict(weights))
        program = export.deserialize(bytearray((folder / "recommend.stablehlo").read_bytes()))
        # Compiled once for each number of rows and of excluded items.
        self.program = jax.jit(program.call)

    def recommend(
        self, history: list[tuple[str, int]], at: int | None = None
    ) -> list[tuple[str, float]]:
        """Returns the best items that the history does not hold, and their scores, best first.

        Args:
            history: (item, time) of each event, oldest first.
            at: the moment of the prediction, for models that were trained to know it.
        """
        known = [(self.index[item], time) for item, time in history if item in self.index]
        if not known:
            raise SystemExit("error: none of the items is in the vocabulary")
        length = self.metadata["max_length"]
        recent = known[-length:]
        items = np.zeros((1, length), np.int32)
        times = np.zeros((1, length), np.int64)
        items[0, : len(recent)], times[0, : len(recent)] = zip(*recent, strict=True)
        seen = sorted({item for item, _ in known})
        # The width is a power of two, so that few programs are compiled.
        exclude = np.zeros((1, 1 << (len(seen) - 1).bit_length()), np.int32)
        exclude[0, : len(seen)] = seen
        lengths = np.array([len(recent)], np.int32)
        gaps = self.gaps(times, lengths)
        arguments = [self.weights, items, lengths, gaps, exclude]
        if "wait" in self.metadata["arguments"]:
            if at is None:
                raise SystemExit("error: this model takes the moment of prediction, --at TIME")
            arguments.append(np.array([at - recent[-1][1]], np.float32))
        if "date" in self.metadata["arguments"]:
            arguments.append(np.array([recent[-1][1] / 86_400], np.float32))
        scores, best = self.program(*arguments)
        ranked = zip(np.asarray(best)[0], np.asarray(scores)[0], strict=True)
        return [(self.items[i - 1].as_py(), float(score)) for i, score in ranked if i]

    def gaps(self, times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the seconds since the event before, as the model saw them in training."""
        gaps = np.zeros(times.shape, np.float32)
        # RecBole rounds times to float32, and the first padding position gets minus the last time.
        if self.metadata["gaps"] == "recbole":
            gaps[:, 1:] = np.diff(times.astype(np.float32), axis=1)
            return gaps
        gaps[:, 1:] = np.diff(times, axis=1)
        return np.where(np.arange(times.shape[1]) < lengths[:, None], gaps, 0)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("history", nargs="+", metavar="ITEM@TIME")
    parser.add_argument("--top", type=int, default=10, help="how many (default: 10)")
    parser.add_argument(
        "--at", type=int, metavar="TIME", help="moment of the prediction, for models that know it"
    )
    flags = parser.parse_args()
    history = []
    for event in flags.history:
        item, _, time = event.rpartition("@")
        if not item or not time.lstrip("-").isdecimal():
            parser.error(f"{event!r} is not ITEM@TIME with TIME in whole unix seconds")
        history.append((item, int(time)))
    history.sort(key=lambda event: event[1])
    for item, score in Exported(flags.folder).recommend(history, flags.at)[: flags.top]:
        print(f"{item}\t{score:.6f}")


if __name__ == "__main__":
    main()
