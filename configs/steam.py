"""Steam reviews, 5-core, first review of each user and game.

    python -m data_prep steam --deduplicate first --order recbole --out data/steam
    python train.py --config configs/steam.py --workdir runs/steam

About 3.5 million events; meant for a GPU or TPU. Times are whole days, as in Beauty, whose
structure it shares; its settings with the dropout of the denser sets.

Variants:
    causal     causal time, trained at every position
    official   none were released for this set, so those released for Beauty to the letter

Any comparison model by its name: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> config_lib.Config:
    """Settings of the run."""
    config_lib.check_variant(variant, ("causal", "official"))
    config = config_lib.default()
    config.dataset = "data/steam"
    config.prepare = (
        "python -m data_prep steam --deduplicate first --order recbole --out data/steam"
    )
    config.model.update(time_drop_out=0.0, norm_eps=1e-5, p2p_residual=True, is_kai_ming_init=False)
    if variant in config_lib.BASELINES:
        config_lib.use_model(config, variant)
    if variant == "causal":
        config_lib.use_causal_time(config, rows=256, epochs=20)
    if variant == "official":
        config.model.dropout_prob = 0.4
        config.eval.batch_size = 4096
    return config
