"""Loads a folder or GGUF with transformers and evaluates it. Usage: logits.py MODEL TEXT WINDOW"""
import json, sys
from common import load, mean_nll

tokenizer, model = load(sys.argv[1])
print(json.dumps({"mean_nll": mean_nll(tokenizer, model, sys.argv[2], int(sys.argv[3]))}))
