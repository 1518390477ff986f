"""Writes what torch.save makes of small state dicts: pytorch.bin, and two that are refused, pytorch_view.bin with a tensor that is
no contiguous part of its storage and pytorch_old.bin in the format of torch before 1.6.

Run with torch installed: python make_pytorch.py
"""

import collections
import pathlib

import torch

weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
state = collections.OrderedDict(
    {
        "encoder.weight": torch.nn.Parameter(weight),
        "encoder.tied": weight,
        "encoder.part": weight[1],
        "encoder.LayerNorm.gamma": torch.tensor([1.0, -2.5], dtype=torch.float16),
        "encoder.LayerNorm.beta": torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
        "position_ids": torch.tensor([[0, 1, 2]]),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
        "step": 300,
        "note": ["no", {"tensor": 1.5, "at": None}],
    }
)
state._metadata = collections.OrderedDict({"": {"version": 1}})
folder = pathlib.Path(__file__).parent
torch.save(state, folder / "pytorch.bin")
torch.save({"ok": weight, "turned": weight.t()}, folder / "pytorch_view.bin")
torch.save({"weight": weight}, folder / "pytorch_old.bin", _use_new_zipfile_serialization=False)
