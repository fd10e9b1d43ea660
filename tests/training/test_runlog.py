"""The log of a run: what was lost is taken back; signals are requests."""

import json
import os
import signal

import pytest

from tim4rec_jax.errors import UserError
from tim4rec_jax.run import only_process
from tim4rec_jax.training.log import ProgressLine, RunLog, duration
from tim4rec_jax.training.loggers import TensorBoard
from tim4rec_jax.training.processes import stop_on_signal


def records(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_records_after_the_step_resumed_from_are_dropped_and_a_torn_line_too(tmp_path):
    log = RunLog(tmp_path, 0, [TensorBoard()])
    for step in (5, 10, 15):
        log.write("train", step, loss=1.0 / step)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7')  # as a crash leaves it
    log = RunLog(tmp_path, 10, [TensorBoard()])
    log.write("valid", 12, epoch=1)
    log.close()
    found = records(tmp_path)
    assert [(record["kind"], record["step"]) for record in found] == [
        ("train", 5),
        ("train", 10),
        ("valid", 12),
    ]
    assert found[1]["loss"] == 0.1
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def test_progress_shows_the_rate_of_all_steps_since_it_last_did(capsys, monkeypatch):
    now = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    line = ProgressLine(batches_per_epoch=100, epochs=3, samples_per_batch=8.0)
    assert line.update(101, 5.0) is None
    assert line.update(102, 5.0) is None  # in a file, a line every half minute
    assert line.update(121, 4.5) == {"epoch": 2, "loss": 4.5, "samples_per_second": 4.0}
    shown = "epoch 2/3  step 21/100  loss 4.5000  4 samples/s  2:38 left in the epoch\n"
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_first_signal_asks_and_the_second_acts(request):
    # A shell starts background jobs with Ctrl-C ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupt))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_directory_has_one_owner(tmp_path):
    with (
        only_process(tmp_path),
        pytest.raises(UserError, match="another process is training in"),
        only_process(tmp_path),
    ):
        pass
    with only_process(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "content", [b"5\n", b"{}\n", b"[" * 9000 + b"\n", b"\xff\n", b'{"step": "x"}\n']
)
def test_a_damaged_log(tmp_path, content):
    whole = b'{"kind": "train", "step": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + content)
    with pytest.raises(UserError, match=r"log\.jsonl is damaged at line .*; delete it"):
        RunLog(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_pipe_in_the_place_of_a_log(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="it is no file"):
        RunLog(tmp_path, 0)
