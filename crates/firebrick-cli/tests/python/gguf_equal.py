"""Compares a GGUF decoded by the gguf package with the folder we converted it to. Usage: gguf_equal.py FILE.gguf FOLDER"""
import json, sys
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file

reader = GGUFReader(sys.argv[1])
ours = load_file(f"{sys.argv[2]}/model.safetensors")
fields = {f.name: f for f in reader.fields.values()}
heads = int(fields["llama.attention.head_count"].parts[-1][0])
kv_heads = int(fields["llama.attention.head_count_kv"].parts[-1][0])
names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
parts = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
worst, seen = 0.0, 0
for t in reader.tensors:
    name = t.name.removesuffix(".weight")
    values = dequantize(t.data, t.tensor_type).astype(np.float32).reshape(list(reversed(t.shape.tolist())))
    if name in names:
        hf = names[name]
    else:
        _, layer, part = name.split(".")
        hf = f"model.layers.{layer}.{parts[part]}"
        for key, n in (("attn_q", heads), ("attn_k", kv_heads)):
            if part == key:
                rows, cols = values.shape
                values = values.reshape(n, rows // n // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)
    worst = max(worst, float(np.abs(values - ours[hf + ".weight"]).max()))
    seen += 1
print(json.dumps({"largest_difference": worst, "tensors": seen}))
