"""Golden values of AdamW and of clipping by the global norm, from PyTorch: python adamw.py > adamw.json"""

import json

import torch

SHAPES = [[3, 4], [5], [2, 3, 2]]
STEPS = 20


def numbers(tensor):
    return [float(f"{x:.9g}") for x in tensor.detach().flatten().tolist()]


def run(learning_rate, betas, eps, weight_decay, scale):
    generator = torch.Generator().manual_seed(11)
    draw = lambda shape: torch.randn(shape, generator=generator)
    tensors = [draw(s).requires_grad_() for s in SHAPES]
    start = [numbers(t) for t in tensors]
    optimizer = torch.optim.AdamW(
        tensors, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
    )
    gradients, after = [], []
    for _ in range(STEPS):
        for tensor in tensors:
            tensor.grad = scale * draw(tensor.shape)
        gradients.append([numbers(t.grad) for t in tensors])
        optimizer.step()
        after.append([numbers(t) for t in tensors])
    return {
        "learning_rate": learning_rate,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "start": start,
        "gradients": gradients,
        "after": [after[0], after[1], after[4], after[-1]],
    }


def clip(max_norm, scale):
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.zeros(s, requires_grad=True) for s in SHAPES]
    for tensor in tensors:
        tensor.grad = scale * torch.randn(tensor.shape, generator=generator)
    before = [numbers(t.grad) for t in tensors]
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    return {
        "max_norm": max_norm,
        "norm": float(norm),
        "before": before,
        "after": [numbers(t.grad) for t in tensors],
    }


golden = {
    "torch": torch.__version__.split("+")[0],
    "shapes": SHAPES,
    "after_steps": [1, 2, 5, STEPS],
    "adamw": [
        run(1e-3, [0.9, 0.999], 1e-8, 0.01, 1.0),
        run(2e-2, [0.8, 0.95], 1e-6, 0.1, 1e-3),
        run(1e-3, [0.9, 0.999], 1e-8, 0.0, 1e-6),
    ],
    "clip": [clip(1.0, 1.0), clip(100.0, 1.0), clip(0.5, 1e-4)],
}
print(json.dumps(golden, separators=(",", ":")))
