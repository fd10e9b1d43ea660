"""Commands killed at random moments: what they write is there whole, or as it was before."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.interop.golden_models import read_golden
from tests.interop.torch_format import recbole_checkpoint, torch_save
from tests.serving.conftest import KINDS
from tests.serving.tiny_run import ONE_DEVICE, save_run, tiny_dataset
from tim4rec_jax.data import open_dataset
from tim4rec_jax.run import load_model
from tim4rec_jax.verify import verify

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
KILLS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return save_run(folder / "run", tiny_dataset(folder / "data"), **KINDS["causal"])


def execute(*command, patience=None):
    """Exit code and seconds of a command, which is killed when patience ends (code None)."""
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None, time.monotonic() - begun
    assert process.returncode == 0, said
    return process.returncode, time.monotonic() - begun


def kill_again_and_again(command, check, restart):
    """Kills a command twenty times at random moments, and looks at what is there each time."""
    drawn, kills = random.Random(0), 0
    _, seconds = execute(*command)
    check(finished=True)
    restart()
    while kills < KILLS:
        code, _ = execute(*command, patience=drawn.uniform(0.2, 1.1) * seconds)
        kills += code is None
        check(finished=code == 0)
        restart()
    execute(*command)
    check(finished=True)


def log(path, events):
    rows = (f"u{user},i{(user * user + n) % 7},{n}\n" for n in range(events) for user in range(9))
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path


def test_a_dataset_that_is_replaced(tmp_path):
    out = tmp_path / "out"
    first, second = log(tmp_path / "first.csv", 6), log(tmp_path / "second.csv", 8)
    prepare = ["-m", "data_prep", "table", "--overwrite", f"--out={out}"]

    def restart():
        execute(*prepare, first)

    def check(finished):
        events = open_dataset(out).n_events  # which compares the digests of the values
        assert events == 9 * 8 if finished else events in (9 * 6, 9 * 8)
        if finished:
            assert sorted(os.listdir(tmp_path)) == ["first.csv", "out", "second.csv"]

    restart()
    kill_again_and_again([*prepare, second], check, restart)


def test_an_export(tmp_path, run):
    out = tmp_path / "export"
    command = ["-m", "tim4rec_jax.serving", "export", f"--workdir={run}", f"--out={out}"]
    whole = None

    def check(finished):
        nonlocal whole
        if finished:
            whole = whole or sorted(os.listdir(out))
            assert os.listdir(tmp_path) == ["export"]
        if out.exists():
            assert sorted(os.listdir(out)) == whole

    def restart():
        shutil.rmtree(out, ignore_errors=True)

    kill_again_and_again(command, check, restart)


def test_recommendations_for_a_log(tmp_path, run):
    events, out = tmp_path / "events.csv", tmp_path / "best.parquet"
    rows = (f"u{user},i{(user + n) % 30 + 1},{n}\n" for user in range(500) for n in range(9))
    events.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    command = ["-m", "tim4rec_jax.serving", "batch", f"--workdir={run}", f"--events={events}"]

    def check(finished):
        if finished:
            # A killed process may leave its unfinished file, and nothing else.
            found = {name for name in os.listdir(tmp_path) if not name.endswith(".partial")}
            assert found == {"best.parquet", "events.csv"}
        if finished or out.exists():
            assert pq.read_table(out).num_rows == 500 * 10

    def restart():
        out.unlink(missing_ok=True)

    kill_again_and_again([*command, f"--out={out}"], check, restart)


def test_an_evaluation(tmp_path, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report, table, best = (tmp_path / name for name in ("a.json", "a.csv", "a.parquet"))
    command = ["eval.py", f"--workdir={run}", f"--json={report}", f"--csv={table}"]

    def restart():
        report.write_text('{"mine": 1}')
        table.unlink(missing_ok=True)
        best.unlink(missing_ok=True)

    def check(finished):
        found = json.loads(report.read_text())
        assert "metrics" in found if finished else found == {"mine": 1} or "metrics" in found
        assert finished <= table.exists() and finished <= best.exists()
        if table.exists():
            assert table.read_text().endswith("\n")
        if best.exists():
            assert pq.read_table(best).num_rows
        for path, content in before.items():
            assert path.read_bytes() == content

    restart()
    kill_again_and_again([*command, f"--predictions={best}"], check, restart)


def test_a_run_of_another_program(tmp_path):
    golden, run = read_golden("tiny_notime_1layer_noffn"), tmp_path / "run"
    saved = recbole_checkpoint(golden.state_dict, golden.config)
    checkpoint = torch_save(saved, tmp_path / "TiM4Rec.pth")

    def check(finished):
        assert finished <= run.exists()
        if run.exists():
            assert load_model(run)[1].n_items == 39
            assert not [finding for finding in verify(run) if finding.problem]

    def restart():
        shutil.rmtree(run, ignore_errors=True)

    command = ["-m", "tim4rec_jax.interop", checkpoint, f"--workdir={run}"]
    kill_again_and_again(command, check, restart)
