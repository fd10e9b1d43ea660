"""Mamba4Rec as its authors published it."""

from tim4rec_jax.interop.formats.format import DEPTHWISE, Format

FORMAT = Format(
    model="mamba4rec",
    settings={
        "hidden_size": int,
        "num_layers": int,
        "dropout_prob": float,
        "d_state": int,
        "d_conv": int,
        "expand": int,
    },
    modules={
        "item_embedding": "item_embedding",
        "norm": "LayerNorm",
        "blocks.*.mamba": "mamba_layers.*.mamba",
        "blocks.*.mamba.in_proj": "mamba_layers.*.mamba.in_proj",
        "blocks.*.mamba.conv": "mamba_layers.*.mamba.conv1d",
        "blocks.*.mamba.x_proj": "mamba_layers.*.mamba.x_proj",
        "blocks.*.mamba.dt_proj": "mamba_layers.*.mamba.dt_proj",
        "blocks.*.mamba.out_proj": "mamba_layers.*.mamba.out_proj",
        "blocks.*.norm": "mamba_layers.*.LayerNorm",
        "blocks.*.feed_forward.fc1": "mamba_layers.*.ffn.w_1",
        "blocks.*.feed_forward.fc2": "mamba_layers.*.ffn.w_2",
        "blocks.*.feed_forward.norm": "mamba_layers.*.ffn.LayerNorm",
    },
    layouts={"blocks.*.mamba.conv.kernel": DEPTHWISE},
)
