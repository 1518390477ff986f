"""Run by the Python test: blocks.py read.gguf folder

Decodes every packed tensor of the file into folder/NAME.decoded, and encodes its tensor `values` in every type that the package
can encode and we have into folder/TYPE.encoded.
"""

import pathlib
import sys

import gguf
import numpy as np

source, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir()
for t in gguf.GGUFReader(source).tensors:
    data = np.asarray(t.data)
    if t.name != "values":
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(data, t.tensor_type)
        (folder / f"{t.name}.decoded").write_bytes(values.astype(np.float32).tobytes())
        continue
    for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]:
        encoded = gguf.quants.quantize(data, gguf.GGMLQuantizationType[name])
        (folder / f"{name.lower()}.encoded").write_bytes(encoded.tobytes())
