"""Times recommendations for all users from a table: this package beside RecTools' SASRec.

    python -m benchmarks.recommend beauty.csv.gz --rectools rectools/bin/python

The log is a CSV with the columns user_id, item_id, timestamp. Each side trains one epoch of a model
of the same size (64 features, 2 layers, the last 50 events), as quality does not matter here. Then
it recommends ten items to every user, without those that the user has had, from a pandas table of
users to a pandas table. It does so three times: programs are compiled in the first one.
"""

import argparse
import json
import subprocess
import sys
import time

REPEATS = 3


def ours(log, users):
    """A function that recommends with this package."""
    import tim4rec_jax as t4r

    data = t4r.prepare(log, user="user_id", item="item_id", time="timestamp", k_core=1)
    model = t4r.fit(data, "causal", epochs=1, max_length=50, hidden_size=64)
    return lambda: model.recommend(users=users, k=10)


def rectools(log, users):
    """A function that recommends with RecTools; the Python that runs it needs no JAX."""
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    log = log.rename(columns={"timestamp": "datetime"}).assign(weight=1.0)
    dataset = Dataset.construct(log)
    model = SASRecModel(
        n_factors=64,
        n_blocks=2,
        n_heads=1,
        session_max_len=50,
        epochs=1,
        batch_size=128,
        item_net_block_types=(IdEmbeddingsItemNet,),
        verbose=0,
    )
    model.fit(dataset)
    return lambda: model.recommend(users=users, dataset=dataset, k=10, filter_viewed=True)


def measure(side: str, path: str) -> None:
    """Prints the seconds of each repetition, of the clock and of the processor, as JSON."""
    import pandas as pd

    log = pd.read_csv(path, dtype={"user_id": str, "item_id": str})
    log = log[["user_id", "item_id", "timestamp"]]
    users = log["user_id"].unique()
    recommend = {"ours": ours, "rectools": rectools}[side](log, users)
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        rows = len(recommend())
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"users": len(users), "rows": rows, "seconds": seconds}), flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="a CSV with user_id, item_id, timestamp")
    parser.add_argument(
        "--rectools", metavar="PYTHON", help="a Python with `rectools[torch]==0.19.0` and pandas"
    )
    parser.add_argument("--side", choices=["ours", "rectools"], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        measure(flags.side, flags.log)
        return
    pythons = {"ours": sys.executable, "rectools": flags.rectools}
    print("side      call  users   rows     wall s  processor s")
    for side, python in pythons.items():
        if python is None:
            continue
        command = [python, "-m", "benchmarks.recommend", "--side", side, flags.log]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"u')]
        for call, line in enumerate(lines, 1):
            wall, cpu = line["seconds"]
            counts = f"{line['users']:5}  {line['rows']:7}"
            print(f"{side:8}  {call:4}  {counts}  {wall:6.2f}  {cpu:11.2f}")


if __name__ == "__main__":
    main()
