"""KuaiRand-Pure, standard log of 8-21 April 2022: 23,951 users, 7,111 items, 1,134,420 events.

    python -m data_prep kuairand Pure --order recbole --out data/kuairand
    python train.py --config configs/kuairand.py --workdir runs/kuairand

Published (paper v3, table 3; 64-d): HR@10 .1109, NDCG@10 .0611; an independent rerun of the
code .1053 / .0598. Not trained by us yet: the log has to be fetched from its owner.

Variants:
    causal     causal time, trained at every position, an offset for items just had, scores that
               drift with the date: on a smaller slice (README) test Hit@10 .1000, NDCG@10 .0637,
               the paper's model .0944, .0590 (seed 2020)
    official   the released settings to the letter, which switch time off

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "official"))
    config = config_lib.default()
    config.dataset = "data/kuairand"
    config.prepare = "python -m data_prep kuairand Pure --order recbole --out data/kuairand"
    config.model.update(time_drop_out=0.0, norm_eps=1e-10, is_kai_ming_init=False)
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "causal":
        config_lib.use_causal_time(config, rows=64, epochs=25)
        config.model.date_bias_knots = 28  # two weeks: one every half day
        config.model.output_std = 0.002
    if variant == "official":
        config.model.is_time = False
        config.eval.batch_size = 4096
    return config
