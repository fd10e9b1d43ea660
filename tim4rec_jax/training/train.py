"""The training of a run, from its settings to its metrics."""

import fcntl
import json
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.data import (
    PackedBatches,
    TrainBatches,
    open_dataset,
    train_dates,
    train_item_counts,
)
from tim4rec_jax.data.format import DATASET_FILE, ITEMS_FILE
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate, standard_errors
from tim4rec_jax.evaluation.evaluate import batch_settings, compile_evaluation
from tim4rec_jax.evaluation.report import print_report
from tim4rec_jax.files import atomic_write, write_json
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
from tim4rec_jax.training.log import (
    ProgressLine,
    RunLog,
    describe_data,
    describe_model,
    duration,
)
from tim4rec_jax.training.step import init_state, make_batches, make_steps, start_epoch

# Number of dispatches that the host may be ahead of the device. The device never waits, and a
# training that is asked to stop stops soon.
_AHEAD = 4


def train(config: Config, workdir: Path) -> dict:
    """Trains a model, or goes on with the training that `workdir` holds.

    After every epoch the model is validated by full ranking. Training ends after `train.epochs`
    epochs, or earlier if more than `train.patience` epochs in a row had no NDCG@10 as good as the
    best one. Figures are compared as rounded to 4 decimals, and a tie counts as better, as in the
    published code. At the end the best model is tested, once.

    Args:
      config: the settings; see `tim4rec_jax.config`.
      workdir: the run directory, made if missing.

    Returns:
      What `workdir/metrics.json` holds.

    Raises:
      UserError: a setting or the data is wrong, the run is damaged, or the loss is not finite.
      KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
    """
    # All that the settings and the data can get wrong is found before the first write.
    config = config_lib.resolve(config)
    data = config.data
    settings_file, dataset_file = workdir / "config.json", workdir / DATASET_FILE
    items_file = workdir / ITEMS_FILE
    if settings_file.exists():
        check_unchanged(config, settings_file)
    dataset = open_dataset(config.dataset).split(data.split, data.valid_from, data.test_from)
    if dataset_file.exists():
        check_same_dataset(dataset.directory, dataset.metadata, dataset_file)
    batches = make_batches(config, dataset)

    workdir.mkdir(parents=True, exist_ok=True)
    with only_process(workdir):
        if not settings_file.exists():
            write_settings(config, settings_file)
        if not dataset_file.exists():
            write_json(dataset_file, dataset.metadata)
        if not items_file.exists():
            with atomic_write(items_file) as file:
                file.write((dataset.directory / ITEMS_FILE).read_bytes())
        if (workdir / "metrics.json").exists():
            print(f"{workdir} is finished already; its figures are in {workdir / 'metrics.json'}")
            return json.loads((workdir / "metrics.json").read_text())
        return _train(config, workdir, batches)


def _train(config: Config, workdir: Path, batches: TrainBatches | PackedBatches) -> dict:
    data, max_epochs, dataset = config.data, config.train.epochs, batches.dataset
    per_epoch = batches.batches_per_epoch
    print(describe_data(batches))

    # The model and its training step. At first there are shapes only.
    date_range, item_counts = None, None
    if config.model.date_bias_knots:
        date_range = train_dates(dataset)
        write_date_range(workdir, date_range)
    if model_class(config.model).needs_item_counts:
        item_counts = train_item_counts(dataset)
    make_model = partial(
        build,
        config.model,
        n_items=dataset.n_items,
        n_users=dataset.n_users,
        item_counts=item_counts,
        date_range=date_range,
        max_length=data.max_length,
        seed=config.seed,
    )
    graphdef, shapes = nnx.split(nnx.eval_shape(make_model))
    placement = data_sharding(config.train.batch_size)
    steps = make_steps(config, batches, nnx.merge(graphdef, shapes), placement)
    tx = steps.settings.tx
    evaluation = batch_settings(config)

    # Programs are compiled by threads while the weights are drawn and while the model trains.
    pool = ThreadPoolExecutor(2)
    print("compiling the training step", flush=True)
    started = time.perf_counter()
    state_shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated),
        jax.eval_shape(partial(init_state, tx=tx, seed=config.seed), shapes),
    )
    compiling = [pool.submit(lowered.compile) for lowered in steps.lowered(state_shapes)]
    untrained = nnx.merge(graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    compiling_evaluation = pool.submit(
        compile_evaluation, untrained, dataset, "valid", **evaluation
    )
    pool.shutdown(wait=False)
    print(describe_model(graphdef, shapes, data.max_length), flush=True)
    state = init_state(nnx.state(make_model()), tx, config.seed)
    state = jax.device_put(state, placement.replicated)
    for program in compiling:
        program.result()
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)

    # What earlier starts of this run have done.
    checkpoints = Checkpoints(workdir)
    progress = {
        "best": None,  # validation metrics of the best epoch
        "best_epoch": 0,
        "stale_epochs": 0,  # epochs in a row that were not as good as the best
        "seconds": 0.0,  # spent training, over all starts
    }
    restored = checkpoints.restore(state, steps.iterator)
    if restored is not None:
        state, progress = restored
        print(f"resuming at step {int(state.step):,}")
    # The host counts steps by itself: to ask the device would be to wait for it.
    step = int(state.step)
    begun = time.perf_counter() - progress["seconds"]

    def save() -> None:
        progress["seconds"] = time.perf_counter() - begun
        checkpoints.save(state, steps.iterator, progress)

    def check_finite(bad_step: int) -> None:
        if bad_step < 0:
            return
        save()
        checkpoints.wait()
        raise UserError(
            f"the loss or its gradient was not finite at step {bad_step:,} (epoch "
            f"{bad_step // per_epoch + 1}); {workdir}/checkpoints holds the parameters from "
            "before it; try a lower config.train.learning_rate"
        )

    def report(step: int, metrics: dict[str, jax.Array]) -> None:
        check_finite(int(metrics["bad_step"]))
        if shown := line.update(step, float(metrics["loss"])):
            log.write("train", step, **shown)

    with closing(checkpoints), closing(RunLog(workdir, step)) as log, stop_on_signal() as stop:
        check_finite(int(state.bad_step))
        while step < max_epochs * per_epoch and progress["stale_epochs"] <= config.train.patience:
            # Train to the end of the running epoch.
            line = ProgressLine(per_epoch, max_epochs, batches.targets_per_step)
            end = (step // per_epoch + 1) * per_epoch
            dispatched: deque = deque()
            saved = time.perf_counter()
            # The checkpoint of the end of an epoch is written after its validation. Otherwise a
            # run that goes on from there would leave the validation out.
            while step < end:
                if stop:
                    save()
                    checkpoints.wait()
                    line.clear()
                    print(f"stopped at step {step:,}, saved; run the same command to go on")
                    raise KeyboardInterrupt
                if time.perf_counter() - saved > 60 * config.train.checkpoint_minutes:
                    save()
                    saved = time.perf_counter()
                state, metrics, count = steps.run(state, end - step, step % per_epoch)
                step += count
                dispatched.append((step, metrics))
                if len(dispatched) > _AHEAD:
                    report(*dispatched.popleft())
            for entry in dispatched:
                report(*entry)
            line.clear()

            # Validate; keep the parameters if they are the best; save.
            epoch, loss = step // per_epoch, float(state.loss_sum) / float(state.weight_sum)
            state = start_epoch(state)
            compiling_evaluation.result()
            figures, _ = evaluate(nnx.merge(graphdef, state.params), dataset, "valid", **evaluation)
            best = progress["best"]
            better = best is None or round(figures["ndcg@10"], 4) >= round(best["ndcg@10"], 4)
            if better:
                checkpoints.save_best(step, state.params)
                # A checkpoint that calls this epoch the best must not be there before it.
                checkpoints.wait()
                progress |= {"best": figures, "best_epoch": epoch, "stale_epochs": 0}
            else:
                progress["stale_epochs"] += 1
            # After a crash between the two, the epoch is done again and its record removed.
            log.write("valid", step, epoch=epoch, train_loss=loss, **figures)
            save()
            print(
                f"epoch {epoch}: loss {loss:.4f}, validation Hit@10 {figures['hit@10']:.4f}, "
                f"NDCG@10 {figures['ndcg@10']:.4f}{' (best)' if better else ''}, "
                f"{duration(progress['seconds'])} so far",
                flush=True,
            )
        checkpoints.wait()

        # Test the best parameters.
        _, best_model = load_model(workdir)
        figures, ranks = evaluate(best_model, dataset, "test", **evaluation)
        result = {
            "test": figures,
            "test_standard_errors": standard_errors(ranks[ranks > 0]),
            "users": int((ranks > 0).sum()),
            "valid": progress["best"],
            "best_epoch": progress["best_epoch"],
            "epochs": step // per_epoch,
            "seconds": time.perf_counter() - begun,
            "seed": config.seed,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        write_json(workdir / "metrics.json", result)
        log.write("test", step, **figures)
        return result


@contextmanager
def only_process(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in `workdir`.

    The system releases the lock when the process ends, however it ends.

    Raises:
      UserError: another process is training there.
    """
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {workdir}; wait for it") from error
        yield


class Stop:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request. A second one acts at once."""
    stop = Stop()
    before: dict[Any, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number, frame):
        stop.signal = number
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


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
