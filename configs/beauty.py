"""Amazon-Beauty (2014, 5-core): 22,363 users, 12,101 items, 198,502 events."""

from ml_collections import ConfigDict

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    """Settings of the run."""
    config = config_lib.default()
    config.dataset = "data/beauty"
    config.model.update(
        dropout_prob=0.4,
        time_drop_out=0.0,
        norm_eps=1e-5,
        p2p_residual=True,
        is_kai_ming_init=False,
    )
    return config
