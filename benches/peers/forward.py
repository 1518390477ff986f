"""torch on the forward pass without the head: `forward.py FOLDER f32|bf16 THREADS`"""

import sys

from turns import missing, take_turns

try:
    import torch
    from transformers import AutoModelForCausalLM
except ImportError as error:
    missing(error)

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16 if sys.argv[2] == "bf16" else torch.float32).eval()
ids = torch.tensor([i * 7919 % model.config.vocab_size for i in range(512)]).reshape(2, 256)


def work():
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False)


take_turns(f"torch {torch.__version__}", work)
