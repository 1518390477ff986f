"""torch, or torch and peft, on a training step with AdamW: `train.py FOLDER full|lora f32|bf16 THREADS`"""

import sys

from turns import missing, take_turns

lora = sys.argv[2] == "lora"
try:
    import torch
    from transformers import AutoModelForCausalLM

    if lora:
        import peft
except ImportError as error:
    missing(error)

torch.set_num_threads(int(sys.argv[4]))
torch.manual_seed(0)
name = f"torch {torch.__version__}"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16 if sys.argv[3] == "bf16" else torch.float32)
if lora:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    name = f"peft {peft.__version__}, {name}"
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
ids = torch.tensor([i * 7919 % model.config.vocab_size for i in range(512)]).reshape(2, 256)


def work():
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


take_turns(name, work)
