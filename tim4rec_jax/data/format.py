"""What a prepared dataset looks like on disk: file names, Arrow schemas, format version.

A dataset is a directory of three parts, written by ``data_prep`` and read by ``tim4rec_jax.data``:

- ``sequences.arrow`` (or ``sequences-00000-of-00004.arrow`` and so on): Arrow IPC file,
  uncompressed, so that it can be mapped into memory; one row per user, users in order of first
  appearance in the filtered source, shards one after the other.
- ``items.parquet``: one row per item, ``index`` counting from 1 (0 is padding).
- ``dataset.json``: where the events come from and what was done to them. Readers need
  `DATASET_KEYS` at its top level; whatever else it tells is for people.
"""

import pyarrow as pa

FORMAT_VERSION = 1

DATASET_FILE = "dataset.json"
ITEMS_FILE = "items.parquet"
SEQUENCES_GLOB = "sequences*.arrow"

# Of dataset.json: FORMAT_VERSION, a name, "exact" or "recbole", what to find in the other files.
DATASET_KEYS = ("format_version", "name", "order", "shards", "users", "items", "events")

# Indices and times of one user are in the order of events. Lists are never null and never empty.
SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("user", pa.string(), nullable=False),
        pa.field("items", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field(
            "timestamps", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False
        ),
    ]
)

# A further column ``title: string`` (nullable) may follow.
ITEMS_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)


def sequences_file(shard: int = 0, shards: int = 1) -> str:
    """Name of the sequences file that holds shard ``shard`` of ``shards`` (counting from 0)."""
    if shards == 1:
        return "sequences.arrow"
    return f"sequences-{shard:05d}-of-{shards:05d}.arrow"
