"""What `train.py` does: trains, then prints the test figures as a table."""

from pathlib import Path

from rich.console import Console

from tim4rec_jax import compilation_cache
from tim4rec_jax.config import Config
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.report import print_report
from tim4rec_jax.training.checkpoints import silence_echoes
from tim4rec_jax.training.loop import train


def train_and_report(config: Config, workdir: Path) -> None:
    """Trains as `tim4rec_jax.training.loop.train` does and prints what came out.

    Raises:
      UserError: as `train`; a dataset not prepared yet is answered with how to prepare it.
    """
    if not (Path(config.dataset) / "dataset.json").exists():
        raise UserError(
            f"{config.dataset} is not a prepared dataset yet; prepare it with `{config.prepare}`"
        )
    compilation_cache.enable()
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
