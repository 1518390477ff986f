"""Copies a folder with noise on every weight. Usage: perturb.py BASE OUT..."""
import json, shutil, sys
import torch
from safetensors.torch import load_file, save_file

base = load_file(f"{sys.argv[1]}/model.safetensors")
for i, out in enumerate(sys.argv[2:]):
    g = torch.Generator().manual_seed(i)
    shutil.copytree(sys.argv[1], out)
    moved = {k: (v.float() + 0.05 * v.float().std() * torch.randn(v.shape, generator=g)).to(v.dtype) if v.dim() > 1 else v for k, v in base.items()}
    save_file(moved, f"{out}/model.safetensors", metadata={"format": "pt"})
print(json.dumps({"made": len(sys.argv) - 2}))
