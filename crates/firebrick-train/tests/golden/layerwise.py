"""Golden values of LAMB and of both forms of LARS, from their formulas in double precision: python layerwise.py > layerwise.json"""

import json
import math
import random

SIZES = [12, 5, 12]
STEPS = 20


def norm(x):
    return math.sqrt(sum(v * v for v in x))


def trust(w, u, clamp):
    """phi(|w|) / |u|; 1 where either is 0."""
    if norm(w) == 0.0 or norm(u) == 0.0:
        return 1.0
    size = norm(w) if clamp is None else min(max(norm(w), clamp[0]), clamp[1])
    return size / norm(u)


def lamb(run, t, w, g, state, plain):
    b1, b2 = run["betas"]
    decay = 0.0 if plain else run["weight_decay"]
    m, v = state or ([0.0] * len(w), [0.0] * len(w))
    m = [b1 * a + (1 - b1) * b for a, b in zip(m, g)]
    v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g)]
    u = [
        a / (1 - b1**t) / (math.sqrt(b / (1 - b2**t)) + run["eps"]) + decay * x for a, b, x in zip(m, v, w)
    ]
    step = run["learning_rate"] * (1.0 if plain else trust(w, u, run["clamp"]))
    return [x - step * y for x, y in zip(w, u)], (m, v)


def lars_paper(run, t, w, g, state, plain):
    b1 = run["momentum"]
    decay = 0.0 if plain else run["weight_decay"]
    m = state or [0.0] * len(w)
    m = [b1 * a + (1 - b1) * (b + decay * x) for a, b, x in zip(m, g, w)]
    step = run["learning_rate"] * (1.0 if plain else trust(w, m, run["clamp"]))
    return [x - step * y for x, y in zip(w, m)], m


def lars_original(run, t, w, g, state, plain):
    decay = 0.0 if plain else run["weight_decay"]
    v = state or [0.0] * len(w)
    local = 1.0
    if not plain and norm(w) > 0.0 and norm(g) > 0.0:
        local = run["trust"] * norm(w) / (norm(g) + decay * norm(w) + run["eps"])
    v = [run["momentum"] * a + run["learning_rate"] * local * (b + decay * x) for a, b, x in zip(v, g, w)]
    return [x - y for x, y in zip(w, v)], v


def numbers(x):
    return [float(f"{v:.9g}") for v in x]


def run(step, seed, scale, exclude=(), zero=(), **settings):
    draw = random.Random(seed)
    rounded = lambda n: numbers([draw.gauss(0, 1) for _ in range(n)])
    w = [[0.0] * n if i in zero else rounded(n) for i, n in enumerate(SIZES)]
    out = dict(settings, exclude=list(exclude), start=w, gradients=[], after=[])
    states = [None] * len(w)
    for t in range(1, STEPS + 1):
        g = [numbers([scale * x for x in rounded(n)]) for n in SIZES]
        out["gradients"].append(g)
        pairs = [step(settings, t, *args, i in exclude) for i, args in enumerate(zip(w, g, states))]
        w, states = [p[0] for p in pairs], [p[1] for p in pairs]
        if t in (1, 2, 5, STEPS):
            out["after"].append([numbers(x) for x in w])
    return out


adam = dict(betas=[0.9, 0.999], eps=1e-6)
golden = {
    "after_steps": [1, 2, 5, STEPS],
    "lamb": [
        run(lamb, 1, 1.0, learning_rate=1e-2, weight_decay=0.01, clamp=None, **adam),
        run(lamb, 2, 1e-2, (1,), (2,), learning_rate=2e-2, weight_decay=0.1, clamp=[0.0, 2.0], **adam),
    ],
    "lars_paper": [
        run(lars_paper, 3, 1.0, learning_rate=1e-2, momentum=0.9, weight_decay=0.01, clamp=None),
        run(lars_paper, 4, 1e-2, (1,), (2,), learning_rate=1e-2, momentum=0.8, weight_decay=0.1, clamp=[0.5, 2.0]),
    ],
    "lars_original": [
        run(lars_original, 5, 1.0, learning_rate=0.5, momentum=0.9, weight_decay=0.01, trust=1e-2, eps=1e-8),
        run(lars_original, 6, 1e-2, (1,), (2,), learning_rate=0.1, momentum=0.9, weight_decay=0.1, trust=1e-3, eps=1e-4),
    ],
}
print(json.dumps(golden, separators=(",", ":")))
