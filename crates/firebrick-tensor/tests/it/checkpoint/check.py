"""Run by the Python test: check.py read.gguf write.gguf read.safetensors write.safetensors

Describes the files we wrote as JSON on stdout and writes one of each for us to read.
"""

import json
import sys

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

read_gguf, write_gguf, read_st, write_st = sys.argv[1:]

reader = gguf.GGUFReader(read_gguf)
tensors = {}
for t in reader.tensors:
    values = gguf.quants.dequantize(np.asarray(t.data), t.tensor_type)
    shape = [int(n) for n in reversed(t.shape.tolist())]
    tensors[t.name] = [t.tensor_type.name, shape, values.astype(np.float32).ravel().tolist()]
fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}

with safe_open(read_st, "pt") as f:
    metadata = f.metadata()
    torches = {k: [str(f.get_tensor(k).dtype), list(f.get_tensor(k).shape), f.get_tensor(k).double().ravel().tolist()] for k in f.keys()}

json.dump({"fields": fields, "gguf": tensors, "metadata": metadata, "safetensors": torches}, sys.stdout)

writer = gguf.GGUFWriter(write_gguf, "llama")
writer.add_uint32("llama.block_count", 30)
writer.add_float32("llama.rope.freq_base", 1e5)
writer.add_array("tokenizer.ggml.tokens", ["<s>", "Ġthe", ""])
writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
writer.add_bool("x.flag", True)
writer.add_string("x.unknown", "é")
values = (np.arange(3 * 64, dtype=np.float32) - 96) / 7
for name, kind in [("a.weight", "Q4_0"), ("b.weight", "Q4_1"), ("c.weight", "Q8_0"), ("d.weight", "BF16")]:
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values.reshape(3, 64), kind), raw_dtype=kind)
writer.add_tensor("e.weight", values.reshape(3, 64))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

save_file(
    {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16),
        "ids": torch.tensor([1, -2], dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
    },
    write_st,
    metadata={"format": "pt"},
)
