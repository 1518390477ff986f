"""Greedy continuation by llama.cpp: `llama.py MODEL.gguf PROMPT COUNT`; prints the tokens of the prompt and the new ids."""

import json
import sys

import xllamacpp as llama

model, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
params = llama.CommonParams()
params.model.path = model
params.n_ctx = 512
params.n_parallel = 1
params.warmup = False
params.cpuparams.n_threads = 2
params.verbosity = 0
server = llama.Server(params)
answer = server.handle_completions(
    {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
)
if isinstance(answer, str):
    answer = json.loads(answer)
steps = answer["choices"][0]["logprobs"]["content"]
print(json.dumps({"prompt_tokens": answer["usage"]["prompt_tokens"], "ids": [s["id"] for s in steps]}))
