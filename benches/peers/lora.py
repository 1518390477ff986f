"""peft on the same LoRA step. Usage: lora.py FOLDER REPEATS THREADS; prints `peft TOKENS_PER_SECOND`"""
import sys, time, statistics
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
ids = torch.tensor([(i * 7919) % model.config.vocab_size for i in range(512)]).reshape(2, 256)
times = []
for _ in range(int(sys.argv[2]) + 1):
    t = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - t)
print("peft", 512 / statistics.median(times[1:]))
