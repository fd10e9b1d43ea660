"""GRU4Rec as RecBole publishes it."""

from tim4rec_jax.interop.formats.format import TRANSPOSED, Format

FORMAT = Format(
    model="gru4rec",
    settings={"embedding_size": int, "hidden_size": int, "num_layers": int, "dropout_prob": float},
    modules={
        "item_embedding": "item_embedding",
        "blocks.*.input": "gru_layers.weight_ih_l*",
        "blocks.*.recurrent": "gru_layers.weight_hh_l*",
        "dense": "dense",
    },
    layouts={"blocks.*.input": TRANSPOSED, "blocks.*.recurrent": TRANSPOSED},
)
