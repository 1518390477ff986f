"""transformers' OLMoE block with grouped products: `moe.py forward|both THREADS`

The shape is that of benches/src/suites/moe.rs.
"""

import sys

from turns import missing, take_turns

try:
    import torch
    import transformers
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
except ImportError as error:
    missing(error)

backward = sys.argv[1] == "both"
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
config = transformers.OlmoeConfig(
    hidden_size=576,
    intermediate_size=384,
    num_experts=64,
    num_experts_per_tok=8,
    num_hidden_layers=1,
    num_attention_heads=8,
)
# Grouped products, as ours; "eager" loops over the experts.
config._experts_implementation = "grouped_mm"
block = OlmoeSparseMoeBlock(config)
for parameter in block.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
x = torch.randn(1, 512, 576, requires_grad=backward)


def clear():
    x.grad = None
    block.zero_grad()


def work():
    with torch.set_grad_enabled(backward):
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        if backward:
            y.pow(2).mean().backward()


take_turns(f"transformers {transformers.__version__} grouped_mm, torch {torch.__version__}", work, clear)
