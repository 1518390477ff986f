"""Writes blocks.json: what the `gguf` Python package makes of a few blocks of every format.

Run with numpy and gguf installed: python make_blocks.py
All data are little-endian hex. Every case of `encoded` holds `values` (f32), and per format the encoded bytes and, decoded again,
f32. `decoded` holds, per format that the package only decodes, two blocks of random bytes and their values.
"""

import json
import pathlib

import gguf
import numpy as np

rng = np.random.default_rng(20240)


def cases():
    yield "normal", rng.standard_normal(64)
    yield "weights", rng.standard_normal(64) * 0.02 + 0.003
    yield "heavy tails", rng.standard_t(2, 64)
    yield "positive", rng.uniform(0.5, 3.0, 32)
    yield "zeros", np.zeros(32)
    yield "constant", np.full(32, -0.75)
    yield "ties of both signs", np.tile([1.5, -1.5, 0.25, -0.125], 8)
    yield "ties, negative first", np.tile([-1.5, 1.5, 0.25, -0.125], 8)
    # 127 makes the Q8_0 scale exactly one, so the halves are exact ties.
    yield "halves", np.concatenate([[127.0], np.arange(-15, 16) + 0.5])
    yield "scale below f16", rng.standard_normal(32) * 1e-7
    yield "scale subnormal in f16", rng.standard_normal(32) * 1e-5
    yield "near the top of f16", rng.uniform(-65000.0, 65000.0, 32)
    yield "one outlier", np.concatenate([[1000.0], rng.standard_normal(31)])


FORMATS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
DECODED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def hexed(array):
    return np.ascontiguousarray(array).tobytes().hex()


out = []
for name, values in cases():
    values = values.astype(np.float32)
    case = {"name": name, "values": hexed(values), "formats": {}}
    for format in FORMATS:
        kind = gguf.GGMLQuantizationType[format]
        encoded = gguf.quants.quantize(values, kind)
        decoded = gguf.quants.dequantize(encoded, kind)
        assert decoded.dtype == np.float32
        case["formats"][format.lower()] = {"encoded": hexed(encoded), "decoded": hexed(decoded)}
    out.append(case)

decoded = {}
for format in DECODED:
    kind = gguf.GGMLQuantizationType[format]
    values = np.array([np.inf])
    while not np.isfinite(values).all():
        blocks = rng.integers(0, 256, 2 * gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8)
        values = gguf.quants.dequantize(blocks, kind)
    decoded[format.lower()] = {"encoded": hexed(blocks), "decoded": hexed(values)}

path = pathlib.Path(__file__).with_name("blocks.json")
path.write_text(json.dumps({"encoded": out, "decoded": decoded}, indent=0) + "\n")
