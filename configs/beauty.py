"""Amazon-Beauty (2014, 5-core): 22,363 users, 12,101 items, 198,502 events.

    python train.py --config configs/beauty.py --workdir runs/beauty

The first start downloads and prepares the data, as this command does:

    python -m data_prep amazon Beauty --order recbole --out data/beauty

131,413 training samples, about 19 s an epoch on two CPU cores. Times are whole days. The events of
one day stay in the order of the source's rows, which the owner's file sorts by item. In that order
SASRec has test Hit@10 .0774, NDCG@10 .0399 (patience 10, seed 2020).

Variants:
    causal     causal time, trained at every position, a bias for items of the history: test Hit@10
               .088, NDCG@10 .0539 (seeds 2020, 2021, 2022), 25 epochs of about 15 s
    official   the released settings to the letter; ours differ only in the number of users
               validated at once

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "official")
    config = config_lib.default()
    config.dataset = "data/beauty"
    config.prepare = "python -m data_prep amazon Beauty --order recbole --out data/beauty"
    config.data.max_length = 50  # the paper's for sparse data

    # The released Beauty configuration.
    config.model.update(
        name="tim4rec",
        time_encoding="paper",
        hidden_size=64,
        num_layers=2,
        d_state=32,
        d_conv=4,
        expand=2,
        head_dim=32,
        dropout_prob=0.4,  # the sparsest data: twice the dropout of the other sets
        time_drop_out=0.0,
        norm_eps=1e-5,
        is_time=True,
        p2p_residual=True,
        is_kai_ming_init=False,
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

    if variant == "causal":
        # Chosen on the validation split. Times are whole days: many gaps are 0, so small initial
        # outputs and less dropout suffice.
        config.model.update(
            time_encoding="causal",
            single_layer_residual=True,
            repeat_bias=True,
            dropout_prob=0.3,
            output_std=0.002,
        )
        # A row of 50 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before.
        config.train.update(
            objective="every_position", batch_size=32, schedule="cosine", epochs=25, patience=25
        )
    if variant == "official":
        config.eval.batch_size = 4096
    return config
