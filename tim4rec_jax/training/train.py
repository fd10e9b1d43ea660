"""The training of a run, from its settings to its metrics."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax import config as config_lib
from tim4rec_jax import item_rows
from tim4rec_jax.config import Config
from tim4rec_jax.data import (
    PackedBatches,
    TrainBatches,
    item_neighbours,
    open_dataset,
    train_dates,
    train_item_counts,
)
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.evaluation import evaluate, standard_errors
from tim4rec_jax.evaluation import metrics as means_of_users
from tim4rec_jax.evaluation.evaluate import batch_settings, compile_evaluation, rank_targets
from tim4rec_jax.evaluation.metrics import tested
from tim4rec_jax.evaluation.protocol import protocol
from tim4rec_jax.evaluation.report import print_report
from tim4rec_jax.files import write_json
from tim4rec_jax.models import SequenceModel, build
from tim4rec_jax.run import (
    check_unchanged,
    checkpoint_steps,
    claim,
    load_model,
    read_figures,
    silence_echoes,
)
from tim4rec_jax.runtime import (
    Placement,
    enable_compilation_cache,
    keep_bits,
)
from tim4rec_jax.training import processes
from tim4rec_jax.training.checkpoints import Checkpoints
from tim4rec_jax.training.dispatch import make_steps
from tim4rec_jax.training.inputs import choose_devices, feature_arrays, make_batches
from tim4rec_jax.training.log import (
    NoLog,
    ProgressLine,
    RunLog,
    describe_data,
    describe_model,
    duration,
    waiting_for,
)
from tim4rec_jax.training.loggers import Logger, make_loggers
from tim4rec_jax.training.memory import check_memory
from tim4rec_jax.training.state import init_state, start_epoch
from tim4rec_jax.training.warm_start import WarmStart, read_warm_start

# Number of steps that the host may be ahead of the device. The device never waits, and a
# training that is asked to stop stops soon.
_AHEAD = 4


def train(config: Config, workdir: Path) -> dict:
    """Trains a model, or goes on with the training that `workdir` holds.

    With `train.init_from`, it begins with the weights of another run
    (`tim4rec_jax.training.warm_start`). A run with a constant learning rate that is asked for more
    epochs goes on, and ends in the bits of a run that was asked for them from the beginning.

    After every epoch the model is validated by full ranking. Training ends after `train.epochs`
    epochs, or earlier if more than `train.patience` epochs in a row had no NDCG@10 as good as the
    best one. Figures are compared as rounded to 4 decimals, and a tie counts as better, as in the
    published code. At the end the best model is tested, once.

    A GPU leaves the same bits in every run only if XLA is told so before JAX compiles for the first
    time (`tim4rec_jax.runtime.keep_bits`). `train_and_report` does it.

    It works in any thread. Ctrl-C and SIGTERM are asked for a checkpoint in the main thread only.

    Args:
      config: the settings; see `tim4rec_jax.config`.
      workdir: the run directory, made if missing.

    Returns:
      What `workdir/metrics.json` holds.

    Raises:
      UserError: a setting or the data is wrong, the run is damaged, or the loss is not finite.
      KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
    """
    return _run(config_lib.resolve(config), Path(workdir))


def train_and_report(
    config: Config,
    workdir: Path,
    prepare: Callable[[Config], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Trains as `train`, with compiled programs kept on disk, and prints what came out.

    Args:
      config: the settings, resolved.
      workdir: the run directory, made if missing.
      prepare: makes the dataset if it is missing. It is called when the settings are known to be
        those of the run in `workdir`.
      loggers: where figures go besides those that `config.train.loggers` names.

    Raises:
      UserError: as `train`.
      KeyboardInterrupt: likewise.
    """
    keep_bits()
    enable_compilation_cache()
    silence_echoes()
    processes.join()
    with processes.one_voice():
        _train_and_report(config, workdir, prepare, loggers)


def _train_and_report(
    config: Config,
    workdir: Path,
    prepare: Callable[[Config], None] | None,
    loggers: Sequence[Logger],
) -> None:
    figures = _run(config, workdir, prepare, loggers)
    dataset = open_dataset(config.dataset)
    report = {
        "dataset": dataset.name,
        "split": "test",
        "exclude_seen": False,
        "users": figures["users"],
        "metrics": figures["test"],
        "standard_errors": figures["test_standard_errors"],
    }
    if "protocol" in figures:  # a run that an earlier version finished has none
        report |= {"protocol": figures["protocol"], "epoch": figures["best_epoch"]}
    if "oracle" in dataset.metadata and config.data.split == "leave_one_out":
        report["oracle"] = dataset.metadata["oracle"]["test"]
    console = Console(highlight=False)
    print_report(report, console)
    console.out(
        f"best epoch {figures['best_epoch']} of {figures['epochs']}; "
        f"figures in {workdir / 'metrics.json'}"
    )


def _run(
    config: Config,
    workdir: Path,
    prepare: Callable[[Config], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> dict:
    """Finds what settings, data and memory have wrong, and only then writes and trains."""
    data = config.data
    check_unchanged(config, workdir / "config.json", more_epochs=True)
    if prepare is not None:
        prepare(config)
    dataset = open_dataset(config.dataset).split(data.split, data.valid_from, data.test_from)
    dates = train_dates(dataset) if config.model.date_bias_knots else None
    make_model = partial(
        build,
        config.model,
        n_items=dataset.n_items,
        n_users=dataset.n_users,
        date_range=dates,
        max_length=data.max_length,
        seed=config.seed,
        item_features=feature_arrays(dataset) if config.model.item_features else None,
    )
    try:
        structure: Any = nnx.eval_shape(make_model)
    except ValueError as error:
        raise UserError(f"config.model: {first_line(error)}") from error
    if structure.needs_item_counts:
        make_model = partial(make_model, item_counts=train_item_counts(dataset))
    placement = choose_devices(config)
    if placement.by_item is not None:  # several processes spread tables without a word in `config`
        for problem in config_lib.needs_of_whole_tables(config, structure):
            raise UserError(problem)
    if placement.by_item is not None and structure.feature_maps is not None:
        raise UserError(
            f"{dataset.directory} has item features, which are not spread over devices yet; take "
            "config.model.item_features=False, or train in one process without config.mesh and "
            "config.train.item_optimizer"
        )
    if placement.by_item is not None and structure.last_offset is not None:
        raise UserError(
            "config.model.repeat_last has a number for each item, and these are not spread over "
            "devices yet; take config.model.repeat_last=False, or train in one process without "
            "config.mesh and config.train.item_optimizer"
        )
    names = structure.item_rows if placement.by_item is not None else ()
    check_memory(
        config, nnx.to_pure_dict(nnx.state(structure, nnx.Param)), names, placement.mesh.size
    )
    part = processes.share(placement.devices) if processes.together() else (0, 1)
    batches, warm_start = make_batches(config, dataset, *part), None
    if config.train.init_from and not checkpoint_steps(workdir / "checkpoints"):
        warm_start = read_warm_start(config, workdir, dataset, make_model, structure)
    loggers = [*make_loggers(config.train.loggers), *loggers]
    claimed = claim(workdir, config, dataset, dates) if processes.first() else nullcontext()
    with claimed:
        processes.agreed(False, False)  # the others begin when the first one has the directory
        if (workdir / "metrics.json").exists():
            print(f"{workdir} is finished already; its figures are in {workdir / 'metrics.json'}")
            return read_figures(workdir)
        return _train(
            config, workdir, batches, make_model, structure, placement, loggers, warm_start
        )


def _train(
    config: Config,
    workdir: Path,
    batches: TrainBatches | PackedBatches,
    make_model: Callable[..., SequenceModel],
    structure: SequenceModel,
    placement: Placement,
    loggers: Sequence[Logger],
    warm_start: WarmStart | None,
) -> dict:
    """Trains from the beginning or from the last checkpoint to the end.

    Args:
      config: the settings, resolved.
      workdir: the run directory.
      batches: what to train on.
      make_model: draws the initial weights.
      structure: the same model with shapes for weights.
      placement: of arrays on the devices.
      loggers: where figures go besides `log.jsonl`.
      warm_start: what the training begins with instead.
    """
    started = time.process_time()
    dataset, max_epochs, per_epoch = batches.dataset, config.train.epochs, batches.batches_per_epoch
    print(describe_data(batches), flush=True)
    if structure.feature_maps is not None:
        print(f"item features: {dataset.features}", flush=True)
    line = ProgressLine(per_epoch, max_epochs, batches.targets_per_step)

    # Programs are compiled by threads while the weights are drawn and while the model trains.
    graphdef, shapes = nnx.split(structure)
    batching, spread = batch_settings(config), placement.by_item is not None
    # The best epoch is that of the best NDCG@10.
    how: Any = dict(ks=sorted({10, *config.eval.ks}), ties=config.eval.ties)
    users = config.eval.valid_users
    validated: Any = batching | dict(sample=users and (users, config.seed), placement=placement)
    rank = partial(evaluate, **validated, **how)
    steps = make_steps(config, batches, structure, placement)
    make_state = partial(
        init_state, tx=steps.settings.tx, seed=config.seed, by_row=steps.settings.by_row
    )
    names = structure.item_rows if spread else ()
    whole_shapes = jax.eval_shape(make_state, shapes)
    progress = {
        "best": None,  # validation metrics of the best epoch
        "best_epoch": 0,
        "stale_epochs": 0,  # epochs in a row that were not as good as the best
        "seconds": 0.0,  # spent training, over all starts
        "processor_seconds": 0.0,  # of all threads of this process, compilation included
    }
    pool = ThreadPoolExecutor(2)
    with waiting_for("compiling the training step"):
        state_shapes = item_rows.shapes(whole_shapes, names, placement)
        compiling = [pool.submit(lowered.compile) for lowered in steps.lowered(state_shapes)]
        if spread:
            # Two programs whose devices wait for each other must not run at the same time.
            compiling_evaluation = pool.submit(lambda: None)
        else:
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            compiling_evaluation = pool.submit(
                compile_evaluation, nnx.merge(graphdef, zeros), dataset, "valid", **validated
            )
        pool.shutdown(wait=False)
        print(describe_model(structure), flush=True)
        # Nothing is drawn where earlier starts of this run have saved something.
        checkpoints = Checkpoints(workdir, whole_shapes, names)
        restored = checkpoints.restore(state_shapes, steps.iterator)
        if restored is None and config.model.neighbours:
            settings = config.model
            neighbours = item_neighbours(
                dataset, settings.neighbours, follow=settings.neighbours_follow
            )
            make_model = partial(make_model, neighbours=neighbours)
        if restored is not None:
            state, progress = restored
        elif warm_start is not None:
            state = warm_start.state(make_state(nnx.state(make_model())))
            print(warm_start.words, flush=True)
            state = item_rows.spread(state, names, placement)
        elif spread:
            # Each device draws its own rows, so that no table is ever in one place.
            def draw():
                params = nnx.state(make_model())
                return make_state(item_rows.completed(params, names, placement.mesh.size))

            shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes)
            state = jax.jit(draw, out_shardings=shardings)()
        else:
            state = jax.device_put(make_state(nnx.state(make_model())), placement.replicated)
        for program in compiling:
            program.result()
    if restored is not None:
        print(f"resuming at step {int(state.step):,}")
        started -= progress.get("processor_seconds", 0.0)  # a checkpoint of before has none
    # The host counts steps by itself: to ask the device would be to wait for it.
    step = int(state.step)
    begun = time.perf_counter() - progress["seconds"]

    def save() -> None:
        progress["seconds"] = time.perf_counter() - begun
        progress["processor_seconds"] = time.process_time() - started
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

    def epoch_of(step: int) -> int:
        return -(-step // per_epoch)

    def place(step: int) -> str:
        return f"step {step:,}, " * bool(step % per_epoch) + f"epoch {epoch_of(step)}"

    open_log: Any = NoLog
    if processes.first():
        open_log = partial(RunLog, workdir, step, loggers, config_lib.flatten(config))
    # Steps between validations, and between the questions whether to stop or to save.
    interval = config.eval.valid_steps or config.eval.valid_epochs * per_epoch
    ask_every = 8 if processes.together() else 1
    with closing(checkpoints), closing(open_log()) as log, processes.stop_on_signal() as stop:
        check_finite(int(state.bad_step))
        if warm_start is not None:
            save()  # so that the run goes on whatever becomes of the one that it begins with
        while step < max_epochs * per_epoch and progress["stale_epochs"] <= config.train.patience:
            # Train up to the next validation.
            end = min((step // interval + 1) * interval, max_epochs * per_epoch)
            dispatched: deque = deque()
            saved = time.perf_counter()
            # The checkpoint there is written after the validation. Otherwise a run that goes on
            # from it would leave the validation out.
            while step < end:
                stops = saves = False
                if step % ask_every == 0:
                    due = time.perf_counter() - saved > 60 * config.train.checkpoint_minutes
                    stops, saves = processes.agreed(bool(stop), due)
                if stops:
                    save()
                    checkpoints.wait()
                    line.clear()
                    raise KeyboardInterrupt(
                        f"stopped at step {step:,}, saved; run the same command to go on"
                    )
                if compiling_evaluation.done():
                    compiling_evaluation.result()  # raises what it has failed with
                if saves:
                    save()
                    saved = time.perf_counter()
                state, metrics = steps.run(state)
                step += 1
                dispatched.append((step, metrics))
                if len(dispatched) > _AHEAD:
                    report(*dispatched.popleft())
            for entry in dispatched:
                report(*entry)
            line.clear()

            # Validate; keep the parameters if they are the best; save.
            epoch, loss = epoch_of(step), float(state.loss_sum) / float(state.weight_sum)
            state = start_epoch(state)
            compiling_evaluation.result()
            figures, _ = rank(nnx.merge(graphdef, state.params), dataset, "valid")
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
                f"{place(step)}: loss {loss:.4f}, validation Hit@10 {figures['hit@10']:.4f}, "
                f"NDCG@10 {figures['ndcg@10']:.4f}{' (best)' if better else ''}, "
                f"{duration(progress['seconds'])} so far",
                flush=True,
            )
        checkpoints.wait()
        if step < max_epochs * per_epoch:
            print(
                f"stops after {place(step)}: more than {config.train.patience} epochs "
                "in a row (config.train.patience) had no better NDCG@10"
            )

        # Test the best parameters.
        if spread:
            for array in jax.tree.leaves((state.params, state.opt_state)):
                array.delete()  # no more of large tables than must be
            best_model = nnx.merge(graphdef, checkpoints.restore_best(state_shapes.params))
            batching["placement"] = placement
        else:
            _, best_model = load_model(workdir)
        ranks, ties = rank_targets(best_model, dataset, "test", **batching)
        ranks, ties = tested(ranks, ties, how["ties"])
        figures = means_of_users(ranks, how["ks"], ties)
        result = {
            "protocol": protocol(config, dataset, part="test", **how),
            "test": figures,
            "test_standard_errors": standard_errors(ranks, how["ks"], ties),
            "users": len(ranks),
            "valid": progress["best"],
            "best_epoch": progress["best_epoch"],
            "epochs": epoch_of(step),
            "seconds": time.perf_counter() - begun,
            "processor_seconds": time.process_time() - started,
            "seed": config.seed,
            "dataset": dataset.name,
            "content": dataset.metadata.get("content", {}),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        if processes.first():
            write_json(workdir / "metrics.json", result)
        log.write("test", step, **figures)
        log.result = result
        return result
