"""Runs mergekit on a YAML and compares bit for bit with our output. Usage: mergekit_equal.py CONFIG.yml OURS"""
import json, subprocess, sys, os
import torch
from safetensors.torch import load_file

out = sys.argv[2] + "-mergekit"
tool = os.path.join(os.path.dirname(sys.executable), "mergekit-yaml")
subprocess.run([tool, sys.argv[1], out, "--quiet"], check=True, stdout=sys.stderr)
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
