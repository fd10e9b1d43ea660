"""Amazon-Beauty (2014, 5-core): 22,363 users, 12,101 items, 198,502 events.

    python -m data_prep amazon Beauty --order recbole --out data/beauty
    python train.py --config configs/beauty.py --workdir runs/beauty

131,413 training samples, about 19 s an epoch on two CPU cores. Times are whole days, and events of
one day stay in the order of the source's rows, by item in the owner's file. In that order SASRec
has test Hit@10 .0774, NDCG@10 .0399 (patience 10, seed 2020).

Variants:
    causal     causal time, trained at every position, an offset for items just had: test Hit@10
               .088, NDCG@10 .0539 (seeds 2020, 2021, 2022), 25 epochs of about 15 s
    official   the released settings to the letter, which ours only leave in the number of users
               validated at once

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "official"))
    config = config_lib.default()
    config.dataset = "data/beauty"
    config.prepare = "python -m data_prep amazon Beauty --order recbole --out data/beauty"
    config.model.update(
        dropout_prob=0.4,
        time_drop_out=0.0,
        norm_eps=1e-5,
        p2p_residual=True,
        is_kai_ming_init=False,
    )
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "causal":
        config_lib.use_causal_time(config, rows=32, epochs=25)
        config.model.update(dropout_prob=0.3, output_std=0.002)
    if variant == "official":
        config.eval.batch_size = 4096
    return config
