"""MovieLens-1M (5-core): 6,040 users, 3,416 items, 999,611 events; 981,491 training samples.

    python train.py --config configs/ml1m.py --workdir runs/ml1m

The first start downloads and prepares the data, as this command does:

    python -m data_prep movielens ml-1m --order recbole --out data/ml-1m

Published figures under this protocol, in which items of the history are ranked too: SASRec .2952 /
.1662, TRM4Rec .3076 / .1784 (Hit@10 / NDCG@10). Figures of papers that mask the history do not
compare. We have not trained the prefix objective to the end: an epoch takes about half an hour on
two CPU cores.

Variants:
    causal          causal time, trained at every position, a bias for items of the history: test
                    Hit@10 .3834, NDCG@10 .2362 (seed 2020), 35 epochs of about 40 s on two idle
                    CPU cores. With model.hidden_size=128, model.dropout_prob=0.3,
                    train.learning_rate=0.001 and train.epochs=30: .3939 and .2455, twice the time
    256d            the wide model: width 256, state 64, heads of 128, batches of 512
    official        the released 64-d settings to the letter
    256d-official   the released 256-d settings to the letter, which switch time off

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "256d", "official", "256d-official")
    config = config_lib.default()
    config.dataset = "data/ml-1m"
    config.prepare = "python -m data_prep movielens ml-1m --order recbole --out data/ml-1m"
    config.data.max_length = 200  # the paper's for dense data

    # The released 64-d ML-1M configuration.
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
    # The protocol of the paper: Adam, full softmax, early stopping on validation NDCG@10.
    config.train.update(
        objective="prefix",
        loss="cross_entropy",
        batch_size=2048,
        learning_rate=1e-3,
        schedule="constant",
        weight_decay=0.0,
        epochs=300,
        patience=20,
    )
    config.eval.batch_size = 512
    presets.use_baseline(config, variant)
    if variant == "bsarec":
        config.model.update(alpha=0.3, c=9, n_heads=4)  # its paper's for ML-1M

    if variant == "causal":
        config.model.update(time_encoding="causal", single_layer_residual=True, repeat_bias=True)
        # A row of 200 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before. The schedule allows a higher rate.
        config.train.update(
            objective="every_position",
            batch_size=16,
            learning_rate=1.5e-3,
            schedule="cosine",
            epochs=35,
            patience=35,
        )
    if variant in ("256d", "256d-official"):
        config.model.update(hidden_size=256, d_state=64, head_dim=128)
        config.train.batch_size = 512
    if variant == "official":
        config.eval.batch_size = 4096
    if variant == "256d-official":
        config.model.is_time = False
        config.eval.batch_size = 1024
    return config
