"""The op and the block in float64 NumPy, with their gradients: the oracle of all tests.

The op is computed position by position. It is compared with the published code, and every
implementation is compared with it. Nothing has to be compiled for it.
"""

import numpy as np


def recurrence(
    inputs: dict,
    weights: list,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    segment_ids=None,
    **_,
) -> tuple[dict, dict]:
    """Computes what `cases.outcome` returns, and the sizes of the sums over rows and positions.

    Args:
        inputs: arrays by the names of `ssd`'s arguments, and perhaps `time_rate` of the block.
        weights: of `y` [B,L,H,P] and of the final state [B,H,P,N] in the objective.
        dt_softplus: as in `ssd`.
        dt_limit: as in `ssd`.
        segment_ids: as in `ssd`.

    Returns:
        `y`, the final state and the gradients of the weighted sum. Then, for those of `A`, `D` and
        `dt_bias` that are given, the sum of the magnitudes of the terms that the gradient sums.
    """
    v = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    wy, wstate = (np.asarray(w, np.float64) for w in weights)
    x, A = v["x"], v["A"]
    batch, length, heads, width = x.shape
    groups, size = v["B"].shape[2:]
    B, C = (np.repeat(v[name], heads // groups, axis=2) for name in ("B", "C"))
    raw = v["dt"] + v.get("dt_bias", 0)
    smooth = np.logaddexp(0, raw) if dt_softplus else raw
    step = np.clip(smooth, *dt_limit)
    skip = np.zeros((heads, 1))
    if "D" in v:
        skip = v["D"] if v["D"].ndim == 2 else v["D"][:, None]
    rate = A * np.exp(v.get("time_rate", np.zeros_like(step)))
    decay = np.exp(step * rate)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        decay[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0

    states = np.zeros((length + 1, batch, heads, width, size))
    states[0] = v.get("initial_state", 0)
    for t in range(length):
        added = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        states[t + 1] = decay[:, t, :, None, None] * states[t] + added
    y = np.einsum("lbhpn,blhn->blhp", states[1:], C) + skip * x

    dstate = wstate.copy()
    dx, dB, dC, dstep, dlog_decay = (np.zeros_like(a) for a in (x, B, C, step, step))
    for t in reversed(range(length)):
        dstate += wy[:, t, :, :, None] * C[:, t, :, None]
        dC[:, t] = np.einsum("bhpn,bhp->bhn", states[t + 1], wy[:, t])
        added = np.einsum("bhpn,bhn->bhp", dstate, B[:, t])  # the gradient of step * x
        dx[:, t] = step[:, t, :, None] * added + skip * wy[:, t]
        dB[:, t] = np.einsum("bhpn,bhp->bhn", dstate, step[:, t, :, None] * x[:, t])
        dstep[:, t] = np.sum(added * x[:, t], -1)
        dlog_decay[:, t] = decay[:, t] * np.sum(dstate * states[t], (-1, -2))
        dstate *= decay[:, t, :, None, None]
    ddt = (dstep + dlog_decay * rate) * ((smooth >= dt_limit[0]) & (smooth <= dt_limit[1]))
    if dt_softplus:
        ddt *= np.exp(-np.logaddexp(0, -raw))

    terms = {"A": dlog_decay * step * rate / A, "dt_bias": ddt, "D": wy * x}
    if "D" in v and v["D"].ndim == 1:
        terms["D"] = np.sum(terms["D"], -1)
    dB, dC = (d.reshape(*v["B"].shape[:3], -1, size).sum(3) for d in (dB, dC))
    gradients = {"x": dx, "dt": ddt, "B": dB, "C": dC, "initial_state": dstate}
    gradients["time_rate"] = dlog_decay * step * rate
    gradients |= {name: d.sum((0, 1)) for name, d in terms.items()}
    results = {"y": y, "final_state": states[-1]}
    magnitudes = {name: np.abs(d).sum((0, 1)) for name, d in terms.items() if name in v}
    return results | {name: gradients[name] for name in v}, magnitudes


def block(
    inputs: dict,
    weights: np.ndarray,
    *,
    activation: str,
    state: int,
    groups: int = 1,
    eps: float = 1e-5,
    segment_ids=None,
    **_,
) -> dict:
    """Computes what `test_block.outcome` returns: convolution, `recurrence`, gate and norm.

    Args:
        inputs: arrays by the names of `time_aware_ssd_block`'s arguments.
        weights: of its result [B,L,I] in the objective.
        activation: as in `time_aware_ssd_block`.
        state: as there.
        groups: as there.
        eps: as there.
        segment_ids: as there.

    Returns:
        `y` and the gradients of the weighted sum.
    """
    v = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    weights = np.asarray(weights, np.float64)
    kernel, scale = v["conv_kernel"], v["norm_scale"]
    rows, length, _ = v["projected"].shape
    heads, inner, cells = len(v["A"]), len(scale), groups * state
    z, mixed, dt = np.split(v["projected"], [inner, 2 * inner + 2 * cells], axis=-1)
    factor = v.get("time_factor", np.ones_like(dt))

    # The input 0, 1, ... positions before each position, 0 where another segment is.
    run = np.zeros((rows, length), int)
    if segment_ids is not None:
        run[:, 1:] = np.cumsum(np.diff(np.asarray(segment_ids), axis=1) != 0, axis=1)
    seen = []
    for back in range(min(len(kernel), length)):
        own = np.zeros((rows, length, 1))
        own[:, back:, 0] = run[:, back:] == run[:, : length - back]
        seen.append((own, own * np.roll(mixed, back, axis=1)))
    u = v["conv_bias"] + sum(kernel[-1 - k] * x for k, (_, x) in enumerate(seen))
    if activation == "hardswish":
        part, slope = np.clip(u + 3, 0, 6) / 6, np.where(np.abs(u) < 3, (2 * u + 3) / 6, u > 0)
    else:
        part = np.exp(-np.logaddexp(0, -u))
        slope = part * (1 + u * (1 - part))
    x, B, C = np.split(u * part, [inner, inner + cells], axis=-1)
    op_inputs = {
        "x": x.reshape(rows, length, heads, -1),
        "B": B.reshape(rows, length, groups, -1),
        "C": C.reshape(rows, length, groups, -1),
        "dt": dt * factor + v.get("time_step", 0),
        **{name: v[name] for name in ("time_rate",) if name in v},
        **{name: v[name] for name in ("A", "D", "dt_bias")},
    }
    final = np.zeros((rows, heads, inner // heads, state))

    def op(dy):
        weights = [dy.reshape(op_inputs["x"].shape), final]
        return recurrence(op_inputs, weights, dt_softplus=True, segment_ids=segment_ids)[0]

    out = op(np.zeros_like(z))["y"].reshape(z.shape)
    sigmoid = np.exp(-np.logaddexp(0, -z))
    gated = out * z * sigmoid
    root = 1 / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + eps)
    y = gated * root * scale

    dnormed = weights * scale
    share = np.mean(dnormed * gated, axis=-1, keepdims=True)
    dgated = root * (dnormed - gated * root**2 * share)
    dz = dgated * out * sigmoid * (1 + z * (1 - sigmoid))
    d = op(dgated * z * sigmoid)
    du = slope * np.concatenate([d[name].reshape(rows, length, -1) for name in "xBC"], axis=-1)
    dkernel, dmixed = np.zeros_like(kernel), np.zeros_like(mixed)
    for back, (own, x) in enumerate(seen):
        dkernel[-1 - back] = np.sum(du * x, (0, 1))
        dmixed += np.roll(own * du * kernel[-1 - back], -back, axis=1)
    gradients = {
        "projected": np.concatenate([dz, dmixed, d["dt"] * factor], axis=-1),
        "time_factor": d["dt"] * dt,
        "time_step": d["dt"],
        "time_rate": d.get("time_rate"),
        "conv_kernel": dkernel,
        "conv_bias": np.sum(du, (0, 1)),
        **{name: d[name] for name in ("A", "D", "dt_bias")},
        "norm_scale": np.sum(weights * gated * root, (0, 1)),
    }
    return {"y": y, **{name: gradients[name] for name in v}}
