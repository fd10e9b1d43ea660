"""What the experiments share: the comparison models and the check of a variant's name."""

from tim4rec_jax import config as config_lib
from tim4rec_jax.models import DEFAULT_MODEL, MODELS

# Each is a variant of every experiment: `configs/beauty.py:sasrec`.
BASELINES = tuple(name for name in MODELS if name != DEFAULT_MODEL)


def check_variant(variant: str, *own: str) -> None:
    """Checks the name of a variant.

    Args:
      variant: the name; "" is the experiment itself.
      own: the variants of the experiment besides the comparison models.

    Raises:
      ValueError: there is no such variant; the message lists those there are.
    """
    known = (*own, *BASELINES)
    if variant not in ("", *known):
        raise ValueError(f"{variant!r} is not a variant; there are: {', '.join(known)}")


def use_baseline(config: config_lib.Config, variant: str) -> None:
    """Replaces the model by the comparison model of that name, if it is one.

    The model's settings, its objective and its patience (10 epochs; 20 for Mamba4Rec) become those
    of TiM4Rec's comparison, which stand with the model in `tim4rec_jax/models/`. Data, optimiser
    and batches stay those of the experiment.

    Args:
      config: changed in place.
      variant: the name of a comparison model; another variant changes nothing.
    """
    if variant in BASELINES:
        config_lib.use_model(config, variant)
