"""The training of a run, from its settings to its metrics."""

import dataclasses
import fcntl
import json
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.data import (
    Dataset,
    PackedBatches,
    TrainBatches,
    open_dataset,
    train_dates,
    train_item_counts,
)
from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate, standard_errors
from tim4rec_jax.evaluation.evaluate import batch_settings
from tim4rec_jax.evaluation.report import print_report
from tim4rec_jax.files import write_json
from tim4rec_jax.models import build, model_class
from tim4rec_jax.run import (
    check_same_dataset,
    check_unchanged,
    load_model,
    write_date_range,
    write_settings,
)
from tim4rec_jax.runtime import data_sharding, enable_compilation_cache
from tim4rec_jax.training.checkpoints import Checkpoints, silence_echoes
from tim4rec_jax.training.log import ProgressLine, RunLog, duration
from tim4rec_jax.training.step import init_state, make_batches, make_steps

# ---- training.summary
# The size of the data, the size and cost of the model, as a run states them at its start.


def describe_data(batches: TrainBatches | PackedBatches) -> str:
    """One line: users, items, samples and how they are batched."""
    dataset = batches.dataset
    return (
        f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{batches.n_targets:,} training samples in {batches.batches_per_epoch:,} batches, "
        f"{batches.layout}; {dataset.split_in_words}"
    )


def flops_per_sample(graphdef: nnx.GraphDef, params: nnx.State, max_length: int) -> float:
    """Floating-point operations to score all items after one history of `max_length` events.

    Counted by XLA on the program before optimisation.
    """

    def scores(params, items, lengths, gaps):
        model = nnx.merge(graphdef, params)
        return model.encode(items, lengths, gaps) @ model.item_table().T

    history = jnp.zeros((1, max_length), jnp.int32)
    lengths = jnp.full((1,), max_length, jnp.int32)
    lowered = jax.jit(scores).lower(params, history, lengths, history.astype(jnp.float32))
    analysis = lowered.cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def describe_model(graphdef: nnx.GraphDef, params: nnx.State, max_length: int) -> str:
    """One line: parameters and operations per sample."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    flops = flops_per_sample(graphdef, params, max_length)
    return f"model: {count:,} parameters, {flops / 1e6:,.1f} MFLOP per sample (forward)"


# ---- training.interrupt
# Ctrl-C and SIGTERM finish the step, save, then stop; a run directory has one owner.


class Stop:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second one acts at once."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number, frame):
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_process(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in `workdir`; the system frees it however we end.

    Raises:
      UserError: another process is training there.
    """
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {workdir}; wait for it") from error
        yield


# ---- training.loop
# The training of a run, from its settings to its metrics.

# Steps the host may be ahead of the device: enough to never wait, few enough to stop soon.
_AHEAD = 4
_METRIC = "ndcg@10"


def train(config: config_lib.Config, workdir: Path) -> dict:
    """Trains a model, or goes on with the training that `workdir` holds.

    After every epoch the model is validated by full ranking; training ends after
    `train.epochs` epochs, or when more than `train.patience` in a row brought no NDCG@10 as
    good as the best one (ties count as better, on figures rounded to 4 decimals, as in the
    reference). Then the best model is tested, once.

    Args:
      config: settings; see `tim4rec_jax.config`.
      workdir: run directory, made if missing.

    Returns:
      What `workdir/metrics.json` holds.

    Raises:
      UserError: bad settings or data, a damaged run, a loss that is not finite.
      KeyboardInterrupt: Ctrl-C, after saving.
    """
    config = config_lib.resolve(config)
    data = config.data
    dataset = open_dataset(config.dataset).split(data.split, data.valid_from, data.test_from)
    workdir.mkdir(parents=True, exist_ok=True)
    with only_process(workdir):
        return _Run(config, dataset, workdir).train()


class _Run:
    """One process's share in a run: what is needed to train, built once."""

    def __init__(self, config: config_lib.Config, dataset: Dataset, workdir: Path):
        trained_on = workdir / "dataset.json"
        check_same_dataset(dataset.directory, dataset.metadata, trained_on)
        settings = workdir / "config.json"
        if settings.exists():
            check_unchanged(config, settings)
        else:
            write_settings(config, settings)
        date_range = None
        if config.model.date_bias_knots:
            date_range = train_dates(dataset)
            write_date_range(workdir, date_range)
        self.config, self.dataset, self.workdir = config, dataset, workdir

        self.batches = make_batches(config, dataset)
        self.placement = data_sharding(config.train.batch_size)
        counted = model_class(config.model).needs_item_counts  # counting goes over the whole log
        model = build(
            config.model,
            n_items=dataset.n_items,
            n_users=dataset.n_users,
            item_counts=train_item_counts(dataset) if counted else None,
            date_range=date_range,
            max_length=config.data.max_length,
            seed=config.seed,
        )
        self.steps, tx = make_steps(config, dataset, self.batches, model, self.placement)
        self.graphdef, params = nnx.split(model)
        self.state = jax.device_put(init_state(params, tx, config.seed), self.placement.replicated)
        self.progress = {
            "best": None,  # validation metrics of the best epoch
            "best_epoch": 0,
            "stale_epochs": 0,  # epochs in a row that were not better
            "seconds": 0.0,  # spent training, over all starts
        }
        self.checkpoints = Checkpoints(workdir)

    def train(self) -> dict:
        done = self.workdir / "metrics.json"
        if done.exists():
            print(f"{self.workdir} is finished already; its figures are in {done}")
            return json.loads(done.read_text())
        self._resume()
        self.log = RunLog(self.workdir, self._step)
        try:
            with stop_on_signal() as self.stop:
                while not self._finished():
                    self._epoch()
                    self._validate()
            self.checkpoints.wait()
            return self._test(done)
        finally:
            self.checkpoints.close()
            self.log.close()

    def _resume(self) -> None:
        print(describe_data(self.batches))
        print(describe_model(self.graphdef, self.state.params, self.config.data.max_length))
        restored = self.checkpoints.restore(self.state, self.steps.iterator)
        if restored is not None:
            self.state, self.progress = restored
            print(f"resuming at step {int(self.state.step):,}")
        # Counted on the host: asking the device would wait for it.
        self._step = int(self.state.step)
        self._started = time.perf_counter()
        self._check_finite(self._step, int(self.state.bad_step))

    @property
    def _epochs_done(self) -> int:
        return self._step // self.batches.batches_per_epoch

    def _finished(self) -> bool:
        config = self.config.train
        return self._epochs_done >= config.epochs or self.progress["stale_epochs"] > config.patience

    def _epoch(self) -> None:
        """Trains to the end of the running epoch; checkpoints and stops in between if asked."""
        per_epoch = self.batches.batches_per_epoch
        samples = self.batches.n_targets / per_epoch
        line = ProgressLine(per_epoch, self.config.train.epochs, samples)
        end = (self._epochs_done + 1) * per_epoch
        pending: deque = deque()
        saved = time.perf_counter()
        # What is saved at the end of an epoch is saved after its validation, so that going on
        # from there does not leave it out: hence both ifs before the step.
        while self._step < end:
            if self.stop:
                self._save()
                self.checkpoints.wait()
                line.clear()
                print(f"stopped at step {self._step:,}, saved; run the same command to go on")
                raise KeyboardInterrupt
            if time.perf_counter() - saved > 60 * self.config.train.checkpoint_minutes:
                self._save()
                saved = time.perf_counter()
            left, done = end - self._step, self._step % per_epoch
            self.state, metrics, count = self.steps.run(self.state, left, done)
            self._step += count
            pending.append((self._step, metrics))
            if len(pending) > _AHEAD:
                self._report(line, *pending.popleft())
        for step, metrics in pending:
            self._report(line, step, metrics)
        line.clear()

    def _report(self, line: ProgressLine, step: int, metrics: dict[str, jax.Array]) -> None:
        self._check_finite(step, int(metrics["bad_step"]))
        shown = line.update(step, float(metrics["loss"]))
        if shown:
            self.log.write("train", step, **shown)

    def _check_finite(self, step: int, bad_step: int) -> None:
        if bad_step >= 0:
            self._save()
            self.checkpoints.wait()
            raise UserError(
                f"the loss or its gradient was not finite at step {bad_step:,} (epoch "
                f"{bad_step // self.batches.batches_per_epoch + 1}); {self.workdir}/checkpoints "
                "holds the parameters from before it; try a lower config.train.learning_rate"
            )

    def _save(self) -> None:
        progress = self.progress | {"seconds": self._seconds()}
        self.checkpoints.save(self.state, self.steps.iterator, progress)

    def _seconds(self) -> float:
        return self.progress["seconds"] + time.perf_counter() - self._started

    def _validate(self) -> None:
        """Validates after an epoch, keeps the parameters if best, saves, says so."""
        loss = float(self.state.loss_sum / self.state.weight_sum)
        self._reset_loss()
        metrics, _ = self._evaluate(nnx.merge(self.graphdef, self.state.params), "valid")
        best = self.progress["best"]
        better = best is None or round(metrics[_METRIC], 4) >= round(best[_METRIC], 4)
        epoch = self._epochs_done
        if better:
            self.checkpoints.save_best(self._step, self.state.params)
            # The progress that names this epoch the best must not be there before it.
            self.checkpoints.wait()
            self.progress |= {"best": metrics, "best_epoch": epoch, "stale_epochs": 0}
        else:
            self.progress["stale_epochs"] += 1
        # Before the checkpoint, or a crash between the two would leave it out of the log.
        self.log.write("valid", self._step, epoch=epoch, train_loss=loss, **metrics)
        self._save()
        print(
            f"epoch {epoch}: loss {loss:.4f}, validation Hit@10 {metrics['hit@10']:.4f}, "
            f"NDCG@10 {metrics['ndcg@10']:.4f}{' (best)' if better else ''}, "
            f"{duration(self._seconds())} so far",
            flush=True,
        )

    def _reset_loss(self) -> None:
        zero = jax.device_put(np.zeros((), np.float32), self.placement.replicated)
        self.state = dataclasses.replace(self.state, loss_sum=zero, weight_sum=zero.copy())

    def _evaluate(self, model: Any, split: Split) -> tuple[dict[str, float], np.ndarray]:
        return evaluate(model, self.dataset, split, **batch_settings(self.config))

    def _test(self, path: Path) -> dict:
        """Reads the test metrics of the best parameters and writes `metrics.json`."""
        _, model = load_model(self.workdir)
        metrics, ranks = self._evaluate(model, "test")
        figures = {
            "test": metrics,
            "test_standard_errors": standard_errors(ranks[ranks > 0]),
            "users": int((ranks > 0).sum()),
            "valid": self.progress["best"],
            "best_epoch": self.progress["best_epoch"],
            "epochs": self._epochs_done,
            "seconds": self._seconds(),
            "seed": self.config.seed,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        write_json(path, figures)
        self.log.write("test", self._step, **metrics)
        return figures


# ---- training.command
# What `train.py` does: trains, then prints the test figures as a table.


def train_and_report(config: Config, workdir: Path) -> None:
    """Trains as `tim4rec_jax.training.train.train` does and prints what came out.

    Raises:
      UserError: as `train`.
    """
    enable_compilation_cache()
    silence_echoes()
    figures = train(config, workdir)
    dataset = open_dataset(config.dataset)
    users = figures["users"]
    report = {
        "dataset": dataset.name,
        "split": "test",
        "exclude_seen": False,
        "users": users,
        "metrics": figures["test"],
        "standard_errors": figures["test_standard_errors"],
    }
    if "oracle" in dataset.metadata:
        report["oracle"] = dataset.metadata["oracle"]["test"]
    console = Console()
    print_report(report, console)
    console.print(
        f"best epoch {figures['best_epoch']} of {figures['epochs']}; "
        f"figures in {workdir / 'metrics.json'}",
        soft_wrap=True,
    )
