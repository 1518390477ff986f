"""Compares `firebrick extract-lora` with mergekit-extract-lora, and loads the folders with peft.
Usage: extract_lora.py BASE TUNED OURS FULL RANK. OURS has at most RANK ranks a module, FULL all of them."""
import json, os, subprocess, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base, tuned, ours, full, rank = sys.argv[1:6]
theirs = f"{ours}-mergekit"
tool = os.path.join(os.path.dirname(sys.executable), "mergekit-extract-lora")
# Absolute paths, which are not looked for at the Hub.
models = ["--model", os.path.abspath(tuned), "--base-model", os.path.abspath(base)]
line = [tool, *models, "--out-path", theirs, "--max-rank", rank, "--quiet"]
subprocess.run(line, check=True, stdout=sys.stderr)


def products(folder):
    """What each module's factors add, and what is saved whole."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    added = {n.removesuffix(".lora_A.weight"): tensors[n.replace("lora_A", "lora_B")].double() @ a.double()
             for n, a in tensors.items() if "lora_A" in n}
    return added, {n: t.float() for n, t in tensors.items() if "lora_" not in n}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).unsqueeze(0)).logits


def largest(a, b):
    return (a - b).abs().max().item()


(mine, mine_whole), (other, other_whole) = products(ours), products(theirs)
both = [n for n in other if n in mine]


def apart(n, m):
    return ((mine[n] - other[m]).norm() / other[m].norm()).item()


found = {
    "modules": len(both), "only_mergekit": [n for n in other if n not in mine], "only_ours": [n for n in mine if n not in other],
    "largest_relative": max(apart(n, n) for n in both),
    "control": max((apart(n, m) for n in both for m in both if n != m and mine[n].shape == other[m].shape)),
    "whole": sorted(mine_whole), "whole_mergekit": sorted(other_whole),
    "largest_whole": max((largest(mine_whole[n], other_whole[n]) for n in mine_whole if n in other_whole), default=0.0),
}
config = json.load(open(f"{ours}/adapter_config.json"))
found["r"] = [config["r"], json.load(open(f"{theirs}/adapter_config.json"))["r"]]
expected = logits(load(tuned))
adapted = PeftModel.from_pretrained(load(base), full).eval()
found["peft_difference"] = largest(logits(adapted), expected)
found["merged_difference"] = largest(logits(adapted.merge_and_unload()), expected)
found["peft_control"] = largest(logits(load(base)), expected)
print(json.dumps(found))
