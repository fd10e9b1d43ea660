"""SSD4Rec* as the authors of TiM4Rec published it."""

from tim4rec_jax.interop.formats.format import DEPTHWISE, Format
from tim4rec_jax.interop.formats.tim4rec import SSD_LAYER, SSD_SETTINGS

FORMAT = Format(
    model="ssd4rec",
    settings=SSD_SETTINGS,
    modules={"item_embedding": "item_embedding", "norm": "in_layer_norm", **SSD_LAYER},
    layouts={"blocks.*.ssd.conv.kernel": DEPTHWISE},
)
