"""Loads a folder or GGUF with transformers and evaluates it. Usage: logits.py MODEL TEXT WINDOW [OURS.safetensors]"""
import json, sys
from common import evaluate, load

tokenizer, model = load(sys.argv[1])
print(json.dumps(evaluate(tokenizer, model, sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))
