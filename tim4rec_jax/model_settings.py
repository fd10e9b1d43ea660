"""Settings of every model, with the values that TiM4Rec's comparison used (64-d).

Keys carry the names of the published configuration files, model by model; those of the
comparison models are RecBole's and those of the TiM4Rec repository's own copies.
"""

_ATTENTION = {
    "hidden_size": 64,
    "inner_size": 256,
    "n_layers": 2,
    "n_heads": 8,
    "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "layer_norm_eps": 1e-12,
}

MODEL_SETTINGS = {
    "tim4rec": {
        "time_encoding": "paper",
        "hidden_size": 64,
        "num_layers": 2,
        "dropout_prob": 0.2,
        "time_drop_out": 0.2,
        "d_state": 32,
        "d_conv": 4,
        "expand": 2,
        "head_dim": 32,
        "chunk_size": 0,  # 0: the op chooses; results do not depend on it
        "norm_eps": 1e-12,
        "is_ffn": True,
        "is_time": True,
        "p2p_residual": False,
        "is_kai_ming_init": True,
        # Of the initial weights that an SSD layer ends with. Its norm makes what they multiply one
        # in size however little there is to say; less than the paper's .02, and layers begin by
        # changing little, as attention and Mamba-1 do.
        "output_std": 0.02,
        # Knows when the event to predict happens, as no recommender does beforehand unless it
        # is asked at that very moment. Only with time_encoding "causal".
        "knows_next_time": False,
    },
    "sasrec": {**_ATTENTION},
    "bert4rec": {
        **_ATTENTION,
        "n_heads": 2,
        "hidden_dropout_prob": 0.4,
        "attn_dropout_prob": 0.4,
        "mask_ratio": 0.2,
        "ft_ratio": 0.5,  # share of batches where only the last item is masked
    },
    "tisasrec": {**_ATTENTION, "n_heads": 4, "time_span": 256},
    # Not in the comparison: the settings of its paper for ML-1M, except for the size.
    "hstu": {
        "hidden_size": 64,
        "n_layers": 2,
        "n_heads": 1,
        "hidden_dropout_prob": 0.2,
        "time_buckets": 128,
        "temperature": 0.05,
    },
    "gru4rec": {
        "embedding_size": 64,
        "hidden_size": 128,
        "num_layers": 2,
        "dropout_prob": 0.4,
    },
    "mamba4rec": {
        "hidden_size": 64,
        "num_layers": 2,
        "dropout_prob": 0.2,
        "d_state": 32,
        "d_conv": 4,
        "expand": 2,
    },
    "lrurec": {"hidden_size": 64, "n_layers": 2, "dropout_prob": 0.2},
    "caser": {"embedding_size": 64, "nv": 4, "nh": 8, "dropout_prob": 0.2, "reg_weight": 1e-4},
    "popularity": {},  # nothing to set
    "ssd4rec": {
        "hidden_size": 64,
        "num_layers": 2,
        "dropout_prob": 0.2,
        "d_state": 32,
        "d_conv": 4,
        "expand": 2,
        "head_dim": 32,
        "chunk_size": 0,
        "norm_eps": 1e-12,
        "is_ffn": True,
        "is_kai_ming_init": False,
    },
}
for _settings in MODEL_SETTINGS.values():
    _settings["dtype"] = "float32"  # of the activations; "bfloat16" halves their memory
    # Learns what to add to the scores of items that the history holds. Without it a model whose
    # inputs and scores share one table recommends what was just had. Not in the comparison.
    _settings["repeat_bias"] = False
    # Learns how scores drift with the date of the last event (of the next one, if it knows that),
    # linear between so many dates from the first to the last event of training, which training
    # fills in. 0: not at all.
    _settings["date_bias_knots"] = 0
    _settings["date_bias_dates"] = None
