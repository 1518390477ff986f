"""Windowed mean negative log-likelihood as `firebrick eval` computes it."""
import os
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(path):
    if path.endswith(".gguf"):
        folder, file = os.path.split(os.path.abspath(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return tokenizer, packed.eval()
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def mean_nll(tokenizer, model, text, window):
    ids = tokenizer(open(text).read(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    count = len(ids) // window
    total = 0.0
    with torch.no_grad():
        for i in range(count):
            x = ids[i * window:(i + 1) * window].unsqueeze(0)
            total += model(input_ids=x, labels=x).loss.double().item()
    return total / count
