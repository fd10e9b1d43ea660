"""Which rows of `results.csv` each table of results shows, with which columns.

`benchmarks.results` writes the tables. A row is chosen by its dataset, variant, and the settings
that differ from those of its config.
"""

from collections.abc import Sequence
from typing import NamedTuple

RANKED = {
    "split": "leave_one_out",
    "part": "test",
    "order": "recbole",
    "seen": "ranked",
    "ties": "optimistic",
    "knows_next_time": "no",
}
MASKED = RANKED | {"seen": "masked"}
# The settings that `tim4rec compare` gave to every model, by the name of the dataset.
COMPARED = {
    "ml-100k": "train.objective=every_position train.batch_size=32 train.schedule=cosine "
    "train.epochs=30 train.patience=30",
    "beauty": "train.objective=every_position train.schedule=cosine train.epochs=25 "
    "train.patience=25 train.batch_size=32 model.repeat_bias=True",
    "kuairand-slice": "train.objective=every_position train.schedule=cosine train.epochs=25 "
    "train.patience=25 train.batch_size=64 model.repeat_bias=True model.date_bias_knots=28",
}
COMPARED["beauty-mixed"] = COMPARED["beauty"]
# What a search of six trials chose for each model on ml-100k, besides what all trials had.
_ALIKE = "data.shuffle_ties=True train.epochs=16 train.patience=16"
_PACKED = f"{_ALIKE} model.repeat_bias=True train.objective=every_position train.batch_size=32 " + (
    "train.schedule=cosine"
)
_SMALL = "model.hidden_size=32 train.learning_rate=0.00329 train.weight_decay=0.0001"
_SHALLOW = "model.hidden_size=128 model.n_layers=1"
_SINGLE = "model.hidden_size=128 model.num_layers=1"
_FAST = "model.dropout_prob=0.445 train.learning_rate=0.00559"
TUNED = {
    "causal": f"{_ALIKE} {_FAST} {_SINGLE}",
    "mamba4rec": f"{_PACKED} {_FAST} {_SINGLE} model.single_layer_residual=True",
    "lrurec": f"{_PACKED} {_SHALLOW} model.dropout_prob=0.534",
    "gru4rec": f"{_PACKED} {_FAST} model.embedding_size=32 model.num_layers=1",
    "esasrec": f"{_PACKED} {_FAST} {_SHALLOW}",
    "ssd4rec": f"{_PACKED} {_SMALL} model.dropout_prob=0.411",
    "sasrec": f"{_PACKED} {_SHALLOW} model.attn_dropout_prob=0.338 model.hidden_dropout_prob=0.534",
    "hstu": f"{_PACKED} {_SMALL} model.hidden_dropout_prob=0.411",
}
# The same on the KuaiRand slice.
_OURS_ALIKE = "model.neighbours=64 model.repeat_last=True train.epochs=8 train.patience=8"
_ALL_ALIKE = f"{_OURS_ALIKE} model.date_bias_knots=28 model.repeat_bias=True " + (
    "train.objective=every_position train.batch_size=64 train.schedule=cosine"
)
TUNED_KUAIRAND = {
    "lrurec": f"{_ALL_ALIKE} {_FAST} {_SHALLOW}",
    "causal": f"{_OURS_ALIKE} {_FAST} {_SINGLE} model.output_std=0.02 model.ssd_norm_eps=1.0",
    "mamba4rec": f"{_ALL_ALIKE} {_FAST} {_SINGLE} model.single_layer_residual=True",
    "hstu": f"{_ALL_ALIKE} {_SHALLOW} model.hidden_dropout_prob=0.445 train.learning_rate=0.00559",
    "gru4rec": f"{_ALL_ALIKE} {_FAST} model.embedding_size=32 model.num_layers=1",
    "sasrec": f"{_ALL_ALIKE} {_SMALL} model.attn_dropout_prob=0.14 model.hidden_dropout_prob=0.411",
}


class Table(NamedTuple):
    """A table of a page.

    Attributes:
      protocol: what `PROTOCOL` is in all of its rows.
      chosen: dataset, variant and settings of each row. Of several rows of the CSV file, the one
        with most seeds is taken.
      columns: headings, which are keys of `CELLS`.
      seed: "" or the seed of all rows.
      masked: whether to put the figures with the items of the history masked beside, in columns of
        their own; `protocol` has them ranked.
    """

    protocol: dict[str, str]
    chosen: list[tuple[str, str, str]]
    columns: Sequence[str] = ("data", "config", "seeds", "Hit@10", "NDCG@10", "MRR@10", "best")
    seed: str = ""
    masked: bool = False


def _models(dataset: str, models: str, own: str = "", compared: str = "", alone: str = "") -> list:
    """Choices of models that were compared.

    Args:
      dataset: its name.
      models: variants; "-" is the config itself.
      own: settings of the causal variant.
      compared: settings of the others, besides those in `COMPARED`.
      alone: models that were trained with the settings of their config.
    """
    choices = []
    for model in models.split():
        variant = "" if model == "-" else model
        settings = own if variant == "causal" else f"{COMPARED[dataset]} {compared}"
        choices.append((dataset, variant, "" if model in alone.split() else settings))
    return choices


def _pure(dataset: str, models: str, own: str) -> list:
    """Choices of the causal variant with time and without, and others, none with an addition.

    Args:
      dataset: its name.
      models: variants of the others.
      own: settings that take the additions from the causal variant.
    """
    settings = " ".join(s for s in COMPARED[dataset].split() if not s.startswith("model."))
    ours = [(dataset, "causal", own), (dataset, "causal", f"{own} {NO_TIME}")]
    return ours + [(dataset, model, settings) for model in models.split()]


def _tuned(dataset: str, settings: dict[str, str]) -> list:
    """Choices of models with the settings that a search has found, by their variants."""
    return [(dataset, *each) for each in settings.items()]


NO_BIAS, NO_TIME = "model.repeat_bias=False", "model.is_time=False"
MIXED = "model.dropout_prob=0.5 model.output_std=0.02"
SLICE = "model.date_bias_knots=0 model.output_std=0.02"
MODELS_ML100K = "causal lrurec - hstu mamba4rec ssd4rec tisasrec gru4rec bert4rec sasrec caser"
BOTH = ("data", "config", "seeds", "Hit@10", "NDCG@10", "masked Hit@10", "masked NDCG@10")
TIES = "data.shuffle_ties=True train.learning_rate=0.003"
NEAR = "model.neighbours=64"
AGAIN = f"{NEAR} model.repeat_last=True"
AFTER = f"{NEAR} model.neighbours_follow=True model.neighbour_weight=2.0"
WIDE = "model.dropout_prob=0.3 model.hidden_size=128 train.epochs=30 train.learning_rate=0.001 " + (
    "train.patience=30"
)
TUNED_ALIKE = ("model", "seeds", "Hit@10", "NDCG@10", "masked Hit@10", "masked NDCG@10", "p")
PURE = ("model", "seeds", "Hit@10", "NDCG@10", "best", "p")
COMPARISON = ("model", "seeds", "Hit@10", "NDCG@10", "MRR@10", "best", "p")
TABLES = {
    "readme": Table(
        RANKED,
        [
            ("ml-100k", "", ""),
            ("ml-100k", "sasrec", COMPARED["ml-100k"]),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", TIES),
            ("ml-1m", "causal", NO_BIAS),
            ("ml-1m", "causal", ""),
            ("ml-1m", "causal", WIDE),
            ("beauty", "official", ""),
            ("beauty", "causal", NO_BIAS),
            ("beauty", "causal", ""),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "", "train.patience=5"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10"),
    ),
    "time": Table(
        RANKED,
        [
            ("ml-100k", "", ""),
            ("ml-100k", "", NO_TIME),
            ("ml-100k", "", "model.time_encoding=masked"),
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", NO_TIME),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", f"{NO_TIME} {NO_BIAS}"),
            ("ml-1m", "causal", ""),
            ("ml-1m", "causal", NO_BIAS),
            ("beauty", "sasrec", "train.patience=10"),
            ("beauty", "official", ""),
            ("beauty", "causal", ""),
            ("beauty", "causal", NO_TIME),
            ("beauty", "causal", NO_BIAS),
            ("beauty-mixed", "sasrec", "train.patience=10"),
            ("beauty-mixed", "official", ""),
            ("beauty-mixed", "causal", ""),
            ("beauty-mixed", "causal", MIXED),
            ("beauty-mixed", "causal", f"{NO_TIME} {MIXED}"),
            ("beauty-mixed", "causal", f"{NO_BIAS} {MIXED}"),
            ("kuairand-slice", "", "train.patience=5"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", "model.output_std=0.02"),
            ("kuairand-slice", "causal", SLICE),
            ("kuairand-slice", "causal", f"{NO_TIME} {SLICE}"),
            ("kuairand-slice", "causal", f"{NO_BIAS} {SLICE}"),
            ("synthetic", "", ""),
            ("synthetic", "causal", ""),
        ],
    ),
    "ml-100k": Table(
        RANKED,
        _models(
            "ml-100k",
            f"{MODELS_ML100K} popularity",
            own=NO_BIAS,
            alone="- bert4rec caser popularity",
        ),
        COMPARISON,
    ),
    "ml-100k-bias": Table(
        RANKED,
        _models("ml-100k", "causal hstu sasrec", compared="model.repeat_bias=True"),
        COMPARISON,
    ),
    "ml-100k-tuned": Table(RANKED, _tuned("ml-100k", TUNED), TUNED_ALIKE, masked=True),
    "kuairand-slice-tuned": Table(
        RANKED, _tuned("kuairand-slice", TUNED_KUAIRAND), TUNED_ALIKE, masked=True
    ),
    "ml-100k-pure": Table(
        MASKED, _pure("ml-100k", "hstu tisasrec lrurec sasrec esasrec", NO_BIAS), PURE
    ),
    "beauty-pure": Table(MASKED, _pure("beauty", "sasrec hstu tisasrec", NO_BIAS), PURE),
    "kuairand-slice-pure": Table(
        MASKED,
        _pure("kuairand-slice", "hstu sasrec tisasrec", f"model.date_bias_knots=0 {NO_BIAS}"),
        PURE,
    ),
    "ml-100k-bands": Table(
        RANKED,
        [("ml-100k", "causal", ""), ("ml-100k", "causal", "model.band_events=5")],
        BOTH,
        seed="2020",
        masked=True,
    ),
    "ml-100k-ties": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", TIES),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True {TIES}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "neighbours": Table(
        RANKED,
        [
            ("beauty", "causal", ""),
            ("beauty", "causal", NEAR),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
            ("kuairand-slice", "mamba4rec", COMPARED["kuairand-slice"]),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {NEAR}"),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {AGAIN}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "neighbours-masked": Table(
        MASKED,
        [
            ("beauty", "causal", NEAR),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {NEAR}"),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {AGAIN}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "ml-1m": Table(RANKED, [("ml-1m", "causal", ""), ("ml-1m", "causal", WIDE)], seed="2020"),
    "ml-1m-exact": Table(RANKED | {"order": "exact"}, [("ml-1m", "causal", "")]),
    "beauty": Table(
        RANKED, _models("beauty", "lrurec sasrec causal hstu"), COMPARISON, seed="2020"
    ),
    "beauty-after": Table(
        RANKED, _models("beauty", "causal lrurec sasrec", AFTER, AFTER), COMPARISON, seed="2020"
    ),
    "beauty-mixed": Table(
        RANKED, _models("beauty-mixed", "causal mamba4rec ssd4rec sasrec"), COMPARISON
    ),
    "kuairand-slice": Table(
        RANKED, _models("kuairand-slice", "mamba4rec sasrec causal ssd4rec"), COMPARISON
    ),
    "next-time-unknown": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "hstu", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
        ],
    ),
    "next-time-known": Table(
        RANKED | {"knows_next_time": "yes"},
        [
            ("ml-100k", "causal", "model.knows_next_time=True"),
            (
                "ml-100k",
                "hstu",
                f"{COMPARED['ml-100k']} model.repeat_bias=True model.knows_next_time=True",
            ),
            ("kuairand-slice", "causal", "model.knows_next_time=True"),
            ("kuairand-slice", "causal", f"model.knows_next_time=True {NEAR}"),
        ],
    ),
    "both": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "sasrec", COMPARED["ml-100k"]),
            ("ml-100k", "popularity", ""),
            ("beauty", "popularity", ""),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "popularity", ""),
        ],
        BOTH,
        seed="2020",
        masked=True,
    ),
    "history": Table(
        RANKED | {"part": "valid"},
        [
            ("ml-1m", "causal", NO_BIAS),
            ("beauty-mixed", "causal", f"{NO_BIAS} {MIXED}"),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", ""),
            ("ml-100k", "hstu", COMPARED["ml-100k"]),
            ("ml-100k", "lrurec", COMPARED["ml-100k"]),
        ],
        ("data", "config", "seeds", "NDCG@10", "masked NDCG@10"),
        seed="2020",
        masked=True,
    ),
    "global-time": Table(
        RANKED | {"split": "global_time"},
        [
            ("kuairand-slice", "causal", f"data.split=global_time {SLICE}"),
            ("kuairand-slice", "causal", "data.split=global_time model.output_std=0.02"),
        ],
    ),
}
