"""The models made of attention: what each position sees, and what time does."""

import dataclasses
import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.models.small_models import jit, small_model
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.layers import attention
from tim4rec_jax.models import MODELS
from tim4rec_jax.models.hstu import time_buckets
from tim4rec_jax.models.tisasrec import time_index
from tim4rec_jax.training.objectives import every_position_loss, prefix_loss

ITEMS, LENGTH, ROWS = 30, 12, 3
SMALL = dict(hidden_size=16, inner_size=32, n_heads=4)
CAUSAL = ("sasrec", "tisasrec", "hstu", "esasrec")
causal_models = pytest.mark.parametrize("name", CAUSAL)


@functools.cache
def make(name):
    settings = {key: v for key, v in SMALL.items() if hasattr(MODELS[name].Settings, key)}
    sizes = dict(n_items=ITEMS, max_length=LENGTH)
    return small_model({"name": name, **settings}, spread=0.3, **sizes)


def histories(rows=ROWS):
    rng = np.random.default_rng(0)
    items = rng.integers(1, ITEMS + 1, (rows, LENGTH), dtype=np.int32)
    gaps = np.round(np.exp(rng.uniform(0, 7, (rows, LENGTH)))).astype(np.float32)
    gaps[:, 0] = 0
    return items, gaps


def plain_call(graph, params, items, gaps, segment_ids=None):
    lengths = jnp.full(items.shape[0], items.shape[1])
    return nnx.merge(graph, params)(items, lengths, gaps, segment_ids=segment_ids)


call = jit(plain_call)


@jit
def encode(graph, params, items, lengths, gaps):
    return nnx.merge(graph, params).encode(items, lengths, gaps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class States:
    whole: jax.Array  # [B,L,D], each row one history
    packed: jax.Array  # [B,L,D], each segment one history
    encoded: jax.Array  # [B,D], at `lengths`


@jit
def compute(graph, params, items, lengths, gaps, segment_ids):
    model = nnx.merge(graph, params)
    return States(
        whole=model(items, lengths, gaps),
        packed=model(items, lengths, gaps, segment_ids=segment_ids),
        encoded=model.encode(items, lengths, gaps),
    )


def states(model, items, gaps, *, lengths=None, segment_ids=None):
    """All that the tests of the causal models compare, by one program for each model."""
    lengths = np.full(ROWS, LENGTH) if lengths is None else lengths
    segment_ids = np.zeros_like(items) if segment_ids is None else segment_ids
    found = compute(*model, items, lengths.astype(np.int32), gaps, segment_ids.astype(np.int32))
    return jax.tree.map(np.asarray, found)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


@causal_models
def test_sees_no_future_and_all_of_the_past(name):
    model, (items, gaps) = make(name), histories()
    whole = states(model, items, gaps).whole
    others, other_gaps = items.copy(), gaps.copy()
    others[:, 7:] = others[:, 7:] % ITEMS + 1
    other_gaps[:, 7:] += 30
    changed = states(model, others, other_gaps).whole
    np.testing.assert_array_equal(changed[:, :7], whole[:, :7])
    assert np.all(np.abs(changed[:, 7:] - whole[:, 7:]).max(-1) > 1e-3)
    others = items.copy()
    others[:, 0] = others[:, 0] % ITEMS + 1
    assert np.all(np.abs(states(model, others, gaps).whole - whole).max(-1) > 1e-5)


@pytest.mark.parametrize("name", ["sasrec", "tisasrec"])
def test_blocks_of_queries_leave_nothing_out(name, monkeypatch):
    (graph, params), (items, gaps) = make(name), histories()
    segments = np.repeat([0, 1], [7, 5])[None].repeat(ROWS, 0)
    whole = states((graph, params), items, gaps, segment_ids=segments).packed
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 5)

    def anew(*args):
        return plain_call(*args)

    close(jit(anew)(graph, params, items, gaps, segments), whole)
    text = str(jax.make_jaxpr(anew, static_argnums=0)(graph, params, items, gaps))
    assert "f32[3,4,5,5]" in text  # scores of the first block
    assert "f32[3,4,12,12]" not in text


@causal_models
def test_segments_are_rows_of_their_own(name):
    model, (items, gaps) = make(name), histories()
    cuts = [0, 5, 6, LENGTH]
    segments = np.repeat(np.arange(3), np.diff(cuts))[None].repeat(ROWS, 0)
    gaps[:, cuts[:-1]] = 0
    packed = states(model, items, gaps, segment_ids=segments).packed
    for begin, end in itertools.pairwise(cuts):
        part = np.zeros_like(items)
        part[:, : end - begin] = items[:, begin:end]
        part_gaps = np.zeros_like(gaps)
        part_gaps[:, : end - begin] = gaps[:, begin:end]
        alone = states(model, part, part_gaps).whole
        close(packed[:, begin:end], alone[:, : end - begin])


@causal_models
def test_encode_is_the_hidden_state_at_the_last_event(name):
    model, (items, gaps) = make(name), histories()
    lengths = np.array([1, 7, LENGTH])
    items[np.arange(LENGTH) >= lengths[:, None]] = 0
    gaps[np.arange(LENGTH) == lengths[:, None]] = -8.8e8  # as RecBole leaves it
    found = states(model, items, gaps, lengths=lengths)
    close(found.encoded, found.whole[np.arange(ROWS), lengths - 1])
    cut = encode(*model, items[:2, :8], lengths[:2], gaps[:2])
    close(cut, found.whole[np.arange(2), lengths[:2] - 1])


# The tests above say the same of the states of every model.
@pytest.mark.parametrize(
    "name",
    ["hstu", *(pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL if name != "hstu")],
)
def test_every_position_of_packed_rows_is_every_prefix(name):
    dataset = in_memory(random_histories([9, 4, 7]))
    prefixes = TrainBatches(
        dataset, max_length=12, batch_size=11, seed=0, convention="exact", buckets=[12]
    )
    rows = PackedBatches(dataset, max_length=12, batch_size=1, seed=0)
    batches = jax.device_put((prefixes[0], rows[0]))
    graph, params = make(name)

    @jit
    def losses(graph, params, batches):
        model = nnx.merge(graph, params)
        return prefix_loss(model, batches[0], None), every_position_loss(model, batches[1], None)

    by_prefix, at_once = losses(graph, params, batches)
    np.testing.assert_allclose(at_once, by_prefix, rtol=1e-5)


@pytest.mark.parametrize("name", ["tisasrec", "hstu"])
def test_time_matters(name):
    model, (items, gaps) = make(name), histories()
    apart = np.abs(states(model, items, gaps * 3).whole - states(model, items, gaps).whole).max(-1)
    assert np.all(apart[:, 0] == 0)
    assert np.all(apart[:, 4:] > 1e-5)


def test_bert4rec_sees_both_sides_and_no_padding():
    model, (items, gaps) = make("bert4rec"), histories()
    whole = call(*model, items, gaps)
    for place in (0, LENGTH - 1):
        others = items.copy()
        others[:, place] = others[:, place] % ITEMS + 1
        assert np.all(np.abs(call(*model, others, gaps) - whole).max(-1) > 1e-4)
    items[:, 8:] = 0
    longer = call(*model, items, gaps)[:, :8]
    close(longer, call(*model, items[:, :8], gaps))
    with pytest.raises(ValueError, match="one history each"):
        call(*model, items, gaps, np.zeros_like(items))


def test_bert4rec_predicts_what_fills_a_mask_behind_the_history():
    model, (items, gaps) = make("bert4rec"), histories()
    lengths = np.array([1, 7, LENGTH])
    items[np.arange(LENGTH) >= lengths[:, None]] = 0
    asked = np.zeros_like(items)
    for row, length in enumerate(lengths):
        asked[row, :length] = [*items[row, 1:length], ITEMS + 1]
    filled = call(*model, asked, gaps)[np.arange(ROWS), lengths - 1]
    close(encode(*model, items, lengths, gaps), filled)
    assert np.all(filled[:, -1] == 1)


def test_bert4rec_scores_all_items_but_the_mask_with_a_bias():
    graph, params = make("bert4rec")
    model: Any = nnx.merge(graph, jax.device_put(params))
    table = model.item_table()
    assert table.shape == (ITEMS + 1, 17)
    np.testing.assert_array_equal(table[:, -1], model.output_bias[...])


def test_time_index_is_that_of_the_published_code(golden):
    arrays = np.load(golden / "baselines/tisasrec_tiny.npz")
    times = arrays["in/timestamp_list"]
    span = json.loads(str(arrays["config_json"]))["time_span"]
    index = time_index(jax.device_put(np.diff(times, axis=1, prepend=times[:, :1])), span)
    expected = arrays["out/time_matrix"]
    for row, length in enumerate(arrays["in/item_seq_len"]):
        below = np.tril_indices(length)
        np.testing.assert_array_equal(index[row][below], expected[row][below])


def test_time_index_of_gaps_that_no_integer_holds():
    gaps = jnp.array([[0, 3.9, 1e14, 2, 0.5]], jnp.float32)
    expected = [[3, 0], [256, 256], [256, 256], [256, 256]]
    np.testing.assert_array_equal(time_index(gaps, 256)[0, 1:, :2], expected)
    np.testing.assert_array_equal(time_index(gaps, 256)[0, 4], [256, 256, 2, 0, 0])


def test_time_buckets_are_exact_after_years():
    gaps = jnp.array([[0, 1e8, 2e8, 2, 100]], jnp.float32)
    expected = np.log([100, 102]) / 0.301
    np.testing.assert_array_equal(time_buckets(gaps, 128)[0, 4, 2:4][::-1], expected.astype(int))


def silu(x):
    return x / (1 + np.exp(-x))


def plain_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def hstu_by_loops(weights, items, times, heads, max_length, temperature):
    """Equations 1 to 3 of the paper, one history, one query, one key at a time."""
    table, positions = weights["item_embedding"]["embedding"], weights["position_embedding"]
    x = [table[item] * table.shape[1] ** 0.5 for item in items]
    x = [vector + positions["embedding"][i] for i, vector in enumerate(x)]
    for layer in weights["layers"].values():
        projected = [silu(plain_norm(vector) @ layer["uqvk"]["kernel"]) for vector in x]
        u, q, v, k = zip(*(np.split(p, 4) for p in projected), strict=True)
        following = []
        for i in range(len(x)):
            mixed = np.zeros((heads, len(x[0]) // heads))
            for j in range(i + 1):
                bucket = int(np.log(max(abs(times[i] - times[j]), 1)) / 0.301)
                bias = layer["time_bias"][bucket] + layer["position_bias"][i - j]
                for h in range(heads):
                    query, key, value = (np.split(z, heads)[h] for z in (q[i], k[j], v[j]))
                    mixed[h] += silu(query @ key + bias) / max_length * value
            y = u[i] * plain_norm(mixed.ravel())
            following.append(x[i] + y @ layer["out"]["kernel"] + layer["out"]["bias"])
        x = following
    return [vector / np.linalg.norm(vector) / temperature for vector in x]


def test_hstu_is_its_equations(x64):
    settings = {"name": "hstu", "hidden_size": 8, "n_heads": 2}
    sizes = dict(n_items=ITEMS, max_length=LENGTH, param_dtype=jnp.float64)
    graph, params = small_model(settings, spread=0.3, **sizes)
    items, gaps = histories(1)
    weights = nnx.to_pure_dict(params)
    expected = hstu_by_loops(weights, items[0], np.cumsum(gaps[0]), 2, LENGTH, 0.05)
    close(call(graph, params, items, gaps.astype(np.float64))[0], expected)


def test_hstu_knows_the_next_time_if_it_is_told():
    settings = {"name": "hstu", "hidden_size": 8, "knows_next_time": True}
    model = small_model(settings, spread=0.3, n_items=ITEMS, max_length=LENGTH)

    @jit
    def at(graph, params, hidden, wait):
        return nnx.merge(graph, params).at(hidden, wait)

    hidden = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    waits = np.array([[0, 60, 86400], [1, 60, 86400]], np.float32)
    told = at(*model, hidden, waits)
    np.testing.assert_allclose(np.linalg.norm(told, axis=-1), 1 / 0.05, rtol=1e-5)
    later = at(*model, hidden, waits + np.array([[0, 0, 0], [1, 0, 0]], np.float32))
    assert np.abs(later - told).max(-1)[1, 0] > 1e-3
    np.testing.assert_array_equal(
        np.delete(later.reshape(6, 8), 3, 0), np.delete(told.reshape(6, 8), 3, 0)
    )


def layer_norm_by_hand(weights, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return weights["scale"] * x + weights["bias"]


def dense(weights, x):
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def attention_by_hand(weights, h, heads, seen):
    """Section 3.1 of SASRec's paper with the keys that `seen` [L,L] says."""
    mixed = []
    parts = [np.split(dense(weights[key], h), heads, axis=1) for key in ("query", "key", "value")]
    for query, key, value in zip(*parts, strict=True):
        scores = np.where(seen, query @ key.T / np.sqrt(query.shape[1]), -np.inf)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        mixed.append(scores / scores.sum(1, keepdims=True) @ value)
    return dense(weights["out"], np.concatenate(mixed, axis=1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def esasrec_by_hand(weights, items, heads):
    """The layer of arXiv 2502.03417, section 3.2, as arXiv 2508.06450 puts it together."""
    x = weights["item_embedding"]["embedding"][items]
    x = x + weights["position_embedding"]["embedding"][: len(items)]
    past = np.tri(len(items), dtype=bool)
    for layer in weights["layers"].values():
        h = layer_norm_by_hand(layer["attention_norm"], x, 1e-5)
        y = attention_by_hand(layer["attention"], h, heads, past)
        x = x + sigmoid(dense(layer["attention_gate"], x)) * y
        h = layer_norm_by_hand(layer["feed_forward_norm"], x, 1e-5)
        y = dense(layer["fc2"], silu(dense(layer["fc1"], h)) * dense(layer["fc3"], h))
        x = x + sigmoid(dense(layer["feed_forward_gate"], x)) * y
    return x


def test_esasrec_is_its_equations(x64):
    settings = {"name": "esasrec", "hidden_size": 8, "n_heads": 2}
    sizes = dict(n_items=ITEMS, max_length=LENGTH, param_dtype=jnp.float64)
    graph, params = small_model(settings, spread=0.3, **sizes)
    items, gaps = histories(1)
    expected = esasrec_by_hand(nnx.to_pure_dict(params), items[0], 2)
    close(call(graph, params, items, gaps.astype(np.float64))[0], expected)


def bsarec_by_hand(weights, items, length, heads, alpha, c):
    """Section 4 of the paper for one history, and one frequency of one channel at a time."""
    row = np.concatenate([np.zeros(length - len(items), int), items])
    seen = np.tri(length, dtype=bool) & (row > 0)
    seen |= ~seen.any(1, keepdims=True)  # its softmax of equal penalties
    positions = weights["positions"]
    h = weights["item_embedding"]["embedding"][row] + positions["embedding"]["embedding"]
    h = layer_norm_by_hand(positions["norm"], h, 1e-12)
    times = np.arange(length)
    for layer in weights["layers"].values():
        low = np.zeros_like(h)
        for frequency in range(-(c // 2), c // 2 + 1):
            wave = np.exp(2j * np.pi * frequency * times / length) / np.sqrt(length)
            low += np.real(np.outer(wave, np.conj(wave) @ h))
        filtered = low + layer["beta"] ** 2 * (h - low)
        filtered = layer_norm_by_hand(layer["filter_norm"], filtered + h, 1e-12)
        attended = attention_by_hand(layer["attention"], h, heads, seen)
        attended = layer_norm_by_hand(layer["norm"], attended + h, 1e-12)
        h = alpha * filtered + (1 - alpha) * attended
        inner = dense(layer["fc1"], h)
        inner = inner * np.array([[0.5 * (1 + math.erf(v / 2**0.5)) for v in r] for r in inner])
        h = layer_norm_by_hand(layer["out_norm"], dense(layer["fc2"], inner) + h, 1e-12)
    return h[length - len(items) :]


def test_bsarec_is_its_equations(x64):
    settings = {"name": "bsarec", "hidden_size": 8, "inner_size": 16, "n_heads": 2}
    sizes = dict(n_items=ITEMS, max_length=LENGTH, param_dtype=jnp.float64)
    model = small_model(settings, spread=0.3, **sizes)
    items, gaps = histories(1)
    # Rows narrower than `max_length`, of which the history fills a part.
    items[0, 7:] = 0
    inputs = items[:, :9], np.array([7], np.int32), gaps[:, :9].astype(np.float64)

    @jit
    def both(graph, params, *inputs):
        model = nnx.merge(graph, params)
        return model(*inputs), model.encode(*inputs)

    states, encoded = both(*model, *inputs)
    expected = bsarec_by_hand(nnx.to_pure_dict(model[1]), items[0, :7], LENGTH, 2, 0.7, 5)
    close(states[0, :7], expected)
    close(encoded[0], expected[-1])
    with pytest.raises(ValueError, match="one history each"):
        call(*model, items, gaps, np.zeros_like(items))


def test_bsarec_learns_nothing_for_padding_from_histories():
    """It is `padding_idx=0` in the authors' program, and padding has a part in every frequency."""
    settings = {"name": "bsarec", "hidden_size": 8, "inner_size": 16, "n_heads": 2, "n_layers": 1}
    graph, params = small_model(settings, spread=0.3, n_items=ITEMS, max_length=LENGTH)
    items, lengths = jnp.zeros((1, LENGTH), jnp.int32).at[0, :2].set(1), jnp.array([2])

    def loss(params):
        gaps = jnp.zeros(items.shape, jnp.float32)
        return jnp.square(nnx.merge(graph, params).encode(items, lengths, gaps)).sum()

    table = jax.grad(loss)(params)["item_embedding"]["embedding"][...]
    assert not table[0].any() and table[1].any()
