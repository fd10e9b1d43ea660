"""The models made of RecBole's transformer layers: SASRec, BERT4Rec, TiSASRec."""

from tim4rec_jax.interop.formats.format import Format

_SETTINGS = {
    "hidden_size": int,
    "inner_size": int,
    "n_layers": int,
    "n_heads": int,
    "hidden_dropout_prob": float,
    "attn_dropout_prob": float,
    "layer_norm_eps": float,
}

_THEIRS = "trm_encoder.layer.*"
_MODULES = {
    "item_embedding": "item_embedding",
    "positions.embedding": "position_embedding",
    "positions.norm": "LayerNorm",
    "layers.*.attention.query": f"{_THEIRS}.multi_head_attention.query",
    "layers.*.attention.key": f"{_THEIRS}.multi_head_attention.key",
    "layers.*.attention.value": f"{_THEIRS}.multi_head_attention.value",
    "layers.*.attention.out": f"{_THEIRS}.multi_head_attention.dense",
    "layers.*.norm": f"{_THEIRS}.multi_head_attention.LayerNorm",
    "layers.*.fc1": f"{_THEIRS}.feed_forward.dense_1",
    "layers.*.fc2": f"{_THEIRS}.feed_forward.dense_2",
    "layers.*.out_norm": f"{_THEIRS}.feed_forward.LayerNorm",
}

SASREC = Format(model="sasrec", settings=_SETTINGS, modules=_MODULES)

BERT4REC = Format(
    model="bert4rec",
    settings={**_SETTINGS, "mask_ratio": float},
    modules={**_MODULES, "head": "output_ffn", "head_norm": "output_ln"},
    fixed={"ft_ratio": 0.5},
)

TISASREC = Format(
    model="tisasrec",
    settings={**_SETTINGS, "time_span": int},
    modules={
        **_MODULES,
        "time_keys": "time_matrix_K_emb",
        "time_values": "time_matrix_V_emb",
    },
)
