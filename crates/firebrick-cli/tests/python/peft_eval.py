"""Evaluates a PEFT adapter on a folder. Usage: peft_eval.py MODEL ADAPTER TEXT WINDOW [OURS.safetensors]"""
import json, sys
from peft import PeftModel
from common import evaluate, load

tokenizer, model = load(sys.argv[1])
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
print(json.dumps(evaluate(tokenizer, model, sys.argv[3], int(sys.argv[4]), *sys.argv[5:])))
