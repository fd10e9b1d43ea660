"""The op and its gradients in float64 NumPy, position by position: the oracle of all tests.

It is compared with the published code, and every implementation is compared with it. Nothing has
to be compiled for it.
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
        inputs: arrays by the names of `ssd`'s arguments.
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
    decay = np.exp(step * A)
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
    ddt = (dstep + dlog_decay * A) * ((smooth >= dt_limit[0]) & (smooth <= dt_limit[1]))
    if dt_softplus:
        ddt *= np.exp(-np.logaddexp(0, -raw))

    terms = {"A": dlog_decay * step, "dt_bias": ddt, "D": wy * x}
    if "D" in v and v["D"].ndim == 1:
        terms["D"] = np.sum(terms["D"], -1)
    dB, dC = (d.reshape(*v["B"].shape[:3], -1, size).sum(3) for d in (dB, dC))
    gradients = {"x": dx, "dt": ddt, "B": dB, "C": dC, "initial_state": dstate}
    gradients |= {name: d.sum((0, 1)) for name, d in terms.items()}
    results = {"y": y, "final_state": states[-1]}
    magnitudes = {name: np.abs(d).sum((0, 1)) for name, d in terms.items() if name in v}
    return results | {name: gradients[name] for name in v}, magnitudes
