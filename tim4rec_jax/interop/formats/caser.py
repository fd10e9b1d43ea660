"""Caser as RecBole publishes it."""

from tim4rec_jax.interop.formats.format import Format, Layout

FORMAT = Format(
    model="caser",
    settings={
        "embedding_size": int,
        "nv": int,
        "nh": int,
        "dropout_prob": float,
        "reg_weight": float,
    },
    modules={
        "user_embedding": "user_embedding",
        "item_embedding": "item_embedding",
        "vertical": "conv_v",
        "windows.*": "conv_h.*",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    layouts={
        # Images of one channel: [L, nv] <-> [nv, 1, L, 1], [height, D, nh] <-> [nh, 1, height, D].
        "vertical.kernel": Layout(
            lambda value: value.T[:, None, :, None], lambda value: value[:, 0, :, 0].T
        ),
        "windows.*.kernel": Layout(
            lambda value: value.transpose(2, 0, 1)[:, None],
            lambda value: value[:, 0].transpose(1, 2, 0),
        ),
    },
)
