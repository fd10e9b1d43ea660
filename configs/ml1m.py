"""MovieLens-1M (5-core): 6,040 users, 3,416 items, 999,611 events; 981,491 training samples.

    python -m data_prep movielens ml-1m --order recbole --out data/ml-1m
    python train.py --config configs/ml1m.py --workdir runs/ml1m

Strongest ID-only full-ranking results elsewhere: HR@10 .31-.33, NDCG@10 .18-.193. The prefix
objective, about half an hour an epoch on two CPU cores, we have not trained to the end.

Variants:
    causal          causal time, trained at every position, an offset for items just had: test
                    Hit@10 .3834, NDCG@10 .2362 (seed 2020), 35 epochs of about 40 s on two idle
                    CPU cores
    256d            the wide model: width 256, state 64, heads of 128, batches of 512
    official        the released 64-d settings to the letter
    256d-official   the released 256-d settings to the letter, which switch time off

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "256d", "official", "256d-official"))
    config = config_lib.default()
    config.dataset = "data/ml-1m"
    config.prepare = "python -m data_prep movielens ml-1m --order recbole --out data/ml-1m"
    config.data.max_length = 200
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "causal":
        config_lib.use_causal_time(config, rows=16, epochs=35)
        config.train.learning_rate = 1.5e-3
    official = variant.endswith("official")
    if variant.startswith("256d"):
        config.model.update(hidden_size=256, d_state=64, head_dim=128, is_time=not official)
        config.train.batch_size = 512
    if official:
        config.eval.batch_size = 1024 if variant.startswith("256d") else 4096
    return config
