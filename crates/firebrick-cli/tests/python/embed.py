"""Mean-pooled, normalized vectors of an encoder, and through a PEFT adapter. Usage: embed.py FOLDER ADAPTER TEXT..."""
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

folder, adapter, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model, loading = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
batch = tokenizer(texts, padding=True, truncation=True, max_length=10, return_tensors="pt")


def vectors(model):
    mask = batch["attention_mask"][:, :, None].float()
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).tolist()


found = {"plain": vectors(model), "missing": sorted(loading["missing_keys"]), "unexpected": sorted(loading["unexpected_keys"])}
found["adapted"] = vectors(PeftModel.from_pretrained(model, adapter))
print(json.dumps(found))
