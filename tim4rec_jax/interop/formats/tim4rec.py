"""TiM4Rec as its authors published it."""

from tim4rec_jax.interop.formats.format import DEPTHWISE, Format

SSD_LAYER = {
    "blocks.*.ssd": "ssd_layers.*.ssd",
    "blocks.*.ssd.in_proj": "ssd_layers.*.ssd.in_proj",
    "blocks.*.ssd.conv": "ssd_layers.*.ssd.conv1d",
    "blocks.*.ssd.norm": "ssd_layers.*.ssd.norm",
    "blocks.*.ssd.out_proj": "ssd_layers.*.ssd.out_proj",
    "blocks.*.norm": "ssd_layers.*.layer_norm",
    "blocks.*.feed_forward.fc1": "ssd_layers.*.ffn.fc1",
    "blocks.*.feed_forward.fc2": "ssd_layers.*.ffn.fc2",
    "blocks.*.feed_forward.norm": "ssd_layers.*.ffn.layer_norm",
}

SSD_SETTINGS = {
    "hidden_size": int,
    "num_layers": int,
    "dropout_prob": float,
    "d_state": int,
    "d_conv": int,
    "expand": int,
    "head_dim": int,
    "chunk_size": int,
    "norm_eps": float,
    "is_ffn": bool,
    "is_kai_ming_init": bool,
}

FORMAT = Format(
    model="tim4rec",
    settings={**SSD_SETTINGS, "time_drop_out": float, "is_time": bool, "p2p_residual": bool},
    modules={
        "item_embedding": "item_embedding",
        "norm": "in_layer_norm",
        "time.norm": "layer_norm_time",
        **SSD_LAYER,
        "blocks.*.mixer.scale_in": "ssd_layers.*.ssd.mlp4time_scale.1",
        "blocks.*.mixer.scale_out": "ssd_layers.*.ssd.mlp4time_scale.3",
        "blocks.*.mixer.conv_1": "ssd_layers.*.ssd.conv1d4time_1",
        "blocks.*.mixer.conv_2": "ssd_layers.*.ssd.conv1d4time_2",
        "blocks.*.mixer.gate": "ssd_layers.*.ssd.time_gate_residual.1",
        "blocks.*.mixer.norm": "ssd_layers.*.ssd.time_layer_norm",
    },
    layouts={
        "blocks.*.ssd.conv.kernel": DEPTHWISE,
        "blocks.*.mixer.conv_1.kernel": DEPTHWISE,
        "blocks.*.mixer.conv_2.kernel": DEPTHWISE,
    },
    fixed={"time_encoding": "paper"},
)
