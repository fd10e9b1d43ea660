"""Synthetic data whose best possible scores are known: does time help, and by how much?

    python -m data_prep synthetic --out data/synthetic
    python train.py --config configs/quickstart.py --workdir runs/quickstart

`make quickstart` runs both. Expected (seed 2020): test NDCG@10 about .47, where a model blind to
time cannot exceed .345 and no model .497; under three minutes on two CPU cores.

Variants:
    causal     causal time, trained at every position, an offset for items just had: test Hit@10
               .862, NDCG@10 .496 (oracle .866, .497)
    official   the released ML-1M settings on this data

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "official"))
    config = config_lib.default()
    config.dataset = "data/synthetic"
    config.prepare = "python -m data_prep synthetic --out data/synthetic"
    config.data.max_length = 32
    if variant == "official":
        config.eval.batch_size = 4096
        return config
    # Two lengths, because on a CPU compiling a third costs more than it saves here.
    config.data.buckets = (12, 32)
    config.model.update(dropout_prob=0.1, time_drop_out=0.0, p2p_residual=True)
    config.train.update(batch_size=256, learning_rate=2e-3, epochs=4)
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "causal":
        config_lib.use_causal_time(config, rows=32, epochs=12)
    return config
