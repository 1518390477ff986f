"""Compares what we wrote from a tiny model with the model: a folder by transformers, a GGUF by the gguf package.

Usage: families.py ORIGINAL_FOLDER OUR_FOLDER OURS.gguf
"""
import json, sys
import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

original, folder, file = sys.argv[1:]
PROMPT = torch.tensor([[97, 3, 250, 41, 41, 7, 199, 120, 64, 5, 230, 18]])


def load(path):
    # The eager implementation is the one that caps scores.
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


theirs, ours = load(original), load(folder)
with torch.no_grad():
    expected, found = theirs(PROMPT).logits, ours(PROMPT).logits
    control = theirs(PROMPT.flip(1)).logits
answer = {
    "class": type(ours).__name__,
    "same_class": type(ours) is type(theirs),
    "largest_difference": (expected - found).abs().max().item(),
    "control": (expected - control).abs().max().item(),
}

reader = gguf.GGUFReader(file)
arch_name = str(bytes(reader.fields["general.architecture"].parts[-1]), "utf-8")
arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch_name]
config = theirs.config
names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
state = {k: v.float().numpy() for k, v in theirs.state_dict().items()}
if config.tie_word_embeddings:
    state.pop("lm_head.weight")
allowed = {gguf.TENSOR_NAMES[t].split(".{bid}")[-1].split(".")[-1] for t in gguf.MODEL_TENSORS[arch]}
tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32).reshape(t.shape[::-1].tolist()) for t in reader.tensors}
answer["foreign_tensors"] = [n for n in tensors if n.rsplit(".", 1)[0].split(".")[-1] not in allowed]
worst, expected_names = 0.0, {"rope_freqs.weight"} if "rope_freqs.weight" in tensors else set()
for key, values in state.items():
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    expected_names.add(name)
    stored = tensors.get(name)
    if stored is None:
        continue
    if arch_name.startswith("gemma") and key.endswith("norm.weight"):
        stored = stored - 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if arch_name == "llama" and part in key:
            rows = stored.shape[0]
            stored = stored.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
    worst = max(worst, float(np.abs(stored - values).max()))
answer["names_differ"] = sorted(expected_names ^ set(tensors))
answer["largest_weight_difference"] = worst


def keys(group):
    for name, value in vars(group).items():
        if name.startswith("_"):
            continue
        if isinstance(value, str):
            yield value.replace("{arch}", arch_name)
        elif isinstance(value, type):
            yield from keys(value)


known = set(keys(gguf.Keys))
ours_alone = [k for k in reader.fields if not k.startswith("GGUF.") and k not in known]
answer["foreign_keys"] = ours_alone
print(json.dumps(answer))
