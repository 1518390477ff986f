"""Runs mergekit on a YAML and compares bit for bit with our output. Usage: mergekit_equal.py CONFIG.yml OURS"""
import json, sys
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

out = sys.argv[2] + "-mergekit"
with open(sys.argv[1]) as file:
    config = MergeConfiguration.model_validate(yaml.safe_load(file))
run_merge(config, out, MergeOptions(quiet=True))
theirs, ours = load_file(f"{out}/model.safetensors"), load_file(f"{sys.argv[2]}/model.safetensors")
different, worst, values, ulps = [], 0.0, 0, 0
for name, t in theirs.items():
    o = ours.get(name)
    if o is None or o.dtype != t.dtype or not torch.equal(o, t):
        different.append(name)
        if o is not None and o.shape == t.shape:
            worst = max(worst, (o.float() - t.float()).abs().max().item())
            values += (o != t).sum().item()
            if o.dtype == t.dtype:
                bits = torch.int16 if o.dtype == torch.bfloat16 else torch.int32
                near = (o != t) & (o.float().abs() > 1e-3)
                if near.any():
                    ulps = max(ulps, (o[near].view(bits).int() - t[near].view(bits).int()).abs().max().item())
different += [n for n in ours if n not in theirs]
print(json.dumps({"tensors": len(theirs), "different": len(different), "values": values, "ulps": ulps, "largest": worst, "names": different[:5]}))
