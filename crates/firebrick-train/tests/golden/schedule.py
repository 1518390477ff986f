"""Golden learning-rate factors from transformers: python schedule.py > schedule.json"""

import json

import torch
import transformers
from transformers import get_scheduler

CASES = [
    ("constant", "constant_with_warmup", {}, 4, 12),
    ("linear", "linear", {}, 3, 12),
    ("linear", "linear", {}, 0, 7),
    ("cosine", "cosine", {}, 3, 12),
    ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}, 2, 11),
]

golden = []
for name, theirs, extra, warmup, total in CASES:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    factors = []
    for _ in range(total):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    floor = extra.get("min_lr_rate", 0.0)
    golden.append({"schedule": name, "floor": floor, "warmup": warmup, "total": total, "factors": factors})
print(json.dumps({"transformers": transformers.__version__, "cases": golden}, separators=(",", ":")))
