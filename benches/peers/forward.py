"""torch on the same forward pass. Usage: forward.py FOLDER REPEATS THREADS; prints `torch TOKENS_PER_SECOND`"""
import sys, time, statistics
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([(i * 7919) % model.config.vocab_size for i in range(512)]).reshape(2, 256)
times = []
with torch.no_grad():
    for _ in range(int(sys.argv[2]) + 1):
        t = time.perf_counter()
        model.model(input_ids=ids)
        times.append(time.perf_counter() - t)
print("torch", 512 / statistics.median(times[1:]))
