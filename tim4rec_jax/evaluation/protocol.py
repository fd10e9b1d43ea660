"""The protocol of an evaluation: all that figures depend on besides the model.

Figures of different protocols do not belong into one column. Therefore reports, the figures of a
run, `tim4rec compare` and `benchmarks/results.csv` say the protocol, all in the words of
`protocol`. docs/protocols.md shows what each choice changes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tim4rec_jax.config import Config
from tim4rec_jax.data import Dataset
from tim4rec_jax.data.splits import Split
from tim4rec_jax.evaluation.metrics import Ties
from tim4rec_jax.models import model_class
from tim4rec_jax.run import read_validations


def protocol(
    config: Config,
    dataset: Dataset,
    *,
    part: Split = "test",
    exclude_seen: bool = False,
    ties: Ties | None = None,
    ks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What the figures of a run depend on, under the names of the columns of `results.csv`.

    Args:
        config: the settings of the run.
        dataset: what it was trained on.
        part: whose targets are ranked.
        exclude_seen: whether items of the history are left out of the ranking.
        ties: how a target is ranked among items with its score; `None` takes the settings'.
        ks: the cut-offs of the metrics; `None` takes the settings'.

    Returns:
        `dataset` (its name), `config` and `variant` (where the settings come from, "" if that is
        not known), `model`, `seed`, `split` ("leave_one_out" or "global_time"), `part` ("valid" or
        "test"), `order` of events ("exact" or "recbole"), `seen` ("ranked" or "masked"), `ties`
        ("optimistic" or "expected"), `knows_next_time` (whether the model is told when the target
        happens) and `ks`.
    """
    name, _, variant = config.preset.partition(":")
    return {
        "dataset": dataset.name,
        "config": name,
        "variant": variant,
        "model": config.model.name,
        "seed": config.seed,
        "split": config.data.split,
        "part": part,
        "order": dataset.order,
        "seen": "masked" if exclude_seen else "ranked",
        "ties": ties or config.eval.ties,
        "knows_next_time": bool(
            config.model.get("knows_next_time", model_class(config.model).knows_next_time)
        ),
        "ks": list(config.eval.ks if ks is None else ks),
    }


def best_epoch(workdir: Path) -> int | None:
    """The epoch of the best checkpoint of a run, None if its log does not say."""
    best = max(ocp.utils.checkpoint_steps((workdir / "best").absolute()), default=None)
    try:
        done = read_validations(workdir)
    except OSError:
        return None
    return next((int(each["epoch"]) for each in done if each.get("step", -1) == best), None)
