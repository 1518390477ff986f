"""Makes and saves an adapter with a rank pattern and evaluates it. Usage: peft_save.py MODEL OUT TEXT WINDOW"""
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from common import evaluate, load

torch.manual_seed(0)
tokenizer, model = load(sys.argv[1])
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                    rank_pattern={"layers.1.self_attn.q_proj": 6}, alpha_pattern={"layers.0.mlp.down_proj": 3}, use_rslora=True)
model = get_peft_model(model, config)
for name, p in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.05)
model.eval()
model.save_pretrained(sys.argv[2])
print(json.dumps(evaluate(tokenizer, model, sys.argv[3], int(sys.argv[4]))))
