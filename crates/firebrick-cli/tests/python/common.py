"""Windowed mean negative log-likelihood and last logits as `firebrick eval` computes them."""
import os
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(path):
    if path.endswith(".gguf"):
        folder, file = os.path.split(os.path.abspath(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return tokenizer, packed.eval()
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def evaluate(tokenizer, model, text, window, ours=None):
    """`mean_nll`, and with a file of `firebrick eval --logits` how far its logits are from the model's."""
    ids = tokenizer(open(text).read(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    count = len(ids) // window
    total, last = 0.0, []
    with torch.no_grad():
        for i in range(count):
            x = ids[i * window:(i + 1) * window].unsqueeze(0)
            out = model(input_ids=x, labels=x)
            total += out.loss.double().item()
            last.append(out.logits[0, -1].float())
    found = {"mean_nll": total / count}
    if ours is not None:
        theirs, ours = torch.stack(last), load_file(ours)["logits"]
        found["shape"] = [list(theirs.shape), list(ours.shape)]
        found["largest_difference"] = (theirs - ours).abs().max().item()
        # What another window's logits are away: the size of a difference that means something.
        found["control"] = (theirs - ours.roll(1, 0)).abs().max().item()
    return found
