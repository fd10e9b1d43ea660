"""MovieLens-100K (5-core): 943 users, 1,349 items, 99,287 events; 96,458 training samples.

    python -m data_prep movielens ml-100k --order recbole --out data/ml-100k
    python train.py --config configs/ml100k.py --workdir runs/ml100k

For quick comparisons: short histories, small batches. Expected (seeds 2020, 2021, 2022): test
Hit@10 .137 +- .010, NDCG@10 .064 +- .003 after 8 to 13 epochs of about 40 s on two CPU cores.

Variants:
    causal     causal time, trained at every position, an offset for items just had: test Hit@10
               .252 +- .003, NDCG@10 .135 +- .004 (the same seeds), 30 epochs of about 4 s
    official   the settings released for ML-1M to the letter (none were released for this set):
               histories of 200, batches of 2048, patience 20

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "official"))
    config = config_lib.default()
    config.dataset = "data/ml-100k"
    config.prepare = "python -m data_prep movielens ml-100k --order recbole --out data/ml-100k"
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "official":
        config.data.max_length = 200
        config.eval.batch_size = 4096
    else:
        config.train.batch_size = 256
        config.train.patience = 5
    if variant == "causal":
        config_lib.use_causal_time(config, rows=32, epochs=30)
    return config
