"""MovieLens-100K (5-core): 943 users, 1,349 items, 99,287 events; 96,458 training samples.

    python train.py --config configs/ml100k.py --workdir runs/ml100k

The first start downloads and prepares the data, as this command does:

    python -m data_prep movielens ml-100k --order recbole --out data/ml-100k

It serves quick comparisons: short histories, small batches. Expected (seeds 2020, 2021, 2022): test
Hit@10 .137 +- .010, NDCG@10 .064 +- .003 after 8 to 13 epochs of about 40 s on two CPU cores.

Variants:
    causal     causal time, trained at every position, a bias for items of the history: test Hit@10
               .252 +- .003, NDCG@10 .135 +- .004 (the same seeds), 30 epochs of about 4 s
    official   the settings released for ML-1M to the letter (none were released for this set):
               histories of 200, batches of 2048, patience 20

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "official")
    config = config_lib.default()
    config.dataset = "data/ml-100k"
    config.prepare = "python -m data_prep movielens ml-100k --order recbole --out data/ml-100k"
    config.data.max_length = 50  # a quarter of ML-1M's 200, for speed

    # The model of the released ML-1M configuration.
    config.model.update(
        name="tim4rec",
        time_encoding="paper",
        hidden_size=64,
        num_layers=2,
        d_state=32,
        d_conv=4,
        expand=2,
        head_dim=32,
        dropout_prob=0.2,
        time_drop_out=0.2,
        norm_eps=1e-12,
        is_time=True,
        p2p_residual=False,
        is_kai_ming_init=True,
        repeat_bias=False,
    )
    # The protocol of the paper, with smaller batches and less patience for so little data.
    config.train.update(
        objective="prefix",
        loss="cross_entropy",
        batch_size=256,
        learning_rate=1e-3,
        schedule="constant",
        weight_decay=0.0,
        epochs=300,
        patience=5,
    )
    config.eval.batch_size = 512
    # These trainings keep the patience of 5 epochs, which suffices here.
    presets.use_baseline(config, variant)
    if variant == "bsarec":
        config.model.update(alpha=0.3, c=9, n_heads=4)  # its paper's for ML-1M
    config.train.patience = 5

    if variant == "causal":
        config.model.update(time_encoding="causal", single_layer_residual=True, repeat_bias=True)
        # A row of 50 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before.
        config.train.update(
            objective="every_position", batch_size=32, schedule="cosine", epochs=30, patience=30
        )
    if variant == "official":
        config.data.max_length = 200
        config.train.update(batch_size=2048, patience=20)
        config.eval.batch_size = 4096
    return config
