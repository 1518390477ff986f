"""Merges small random Llama checkpoints with mergekit 0.1.5; every input and result goes to one file a checkpoint type.

Run as `python make_merges.py` in this folder. Tensors are named `case/tensor`, the inputs `base/`, `a/`, `b/` and `c/`.
"""

import json
import logging
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

logging.disable(logging.WARNING)
HIDDEN, INNER, LAYERS, VOCAB = 8, 12, 2, 24
WEIGHTS = [0.5, 0.3, 0.4]

# name: (method, base, models, parameters, per-model parameters)
CASES = {
    "linear": ("linear", None, "abc", {}, {}),
    "linear_sum": ("linear", None, "abc", {"normalize": False}, {}),
    "slerp": ("slerp", "a", "ab", {"t": 0.3}, None),
    "nuslerp": ("nuslerp", None, "ab", {}, {}),
    "nuslerp_base": ("nuslerp", "base", "ab", {}, {}),
    "nuslerp_rows": ("nuslerp", "base", "ab", {"nuslerp_flatten": False}, {}),
    "nuslerp_columns": ("nuslerp", "base", "ab", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {}),
    "passthrough": ("passthrough", None, "a", {}, {"scale": 0.7}),
    "task_arithmetic": ("task_arithmetic", "base", "abc", {"lambda": 0.7}, {}),
    "task_arithmetic_mean": ("task_arithmetic", "base", "abc", {"normalize": True}, {}),
    "ties": ("ties", "base", "abc", {}, {"density": 0.5}),
    "ties_sum": ("ties", "base", "abc", {"normalize": False, "lambda": 1.3}, {"density": 0.3}),
    "ties_rescale": ("ties", "base", "abc", {"rescale": True}, {"density": 0.5}),
    "ties_full": ("ties", "base", "abc", {}, {}),
    "breadcrumbs": ("breadcrumbs", "base", "abc", {}, {"density": 0.5, "gamma": 0.15}),
    "breadcrumbs_ties": ("breadcrumbs_ties", "base", "abc", {}, {"density": 0.6, "gamma": 0.2}),
    "breadcrumbs_default": ("breadcrumbs", "base", "abc", {}, {"density": 0.5}),
    "model_stock": ("model_stock", "base", "abc", {}, None),
    "model_stock_rows": ("model_stock", "base", "abc", {"filter_wise": True}, None),
    "karcher": ("karcher", None, "abc", {}, None),
    "multislerp": ("multislerp", None, "abc", {}, {}),
    "multislerp_base": ("multislerp", "base", "abc", {}, {}),
    "sce": ("sce", "base", "abc", {"select_topk": 0.5}, None),
    "sce_full": ("sce", "base", "abc", {}, None),
    "ram": ("ram", "base", "abc", {}, None),
    "ramplus_tl": ("ramplus_tl", "base", "abc", {}, None),
    "nearswap": ("nearswap", "base", "a", {"t": 0.2}, None),
    "arcee_fusion": ("arcee_fusion", "base", "a", {}, None),
}
TIED = ["linear", "slerp", "ties", "karcher"]


def tensors(tied):
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[layer + name + ".weight"] = shape
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def tied_at_an_edge(delta):
    """Whether equal magnitudes lie on both sides of a rank that a case cuts at: mergekit's order of them is not defined."""
    order, n = delta.abs().flatten().float().sort().values, delta.numel()
    ranks = [n - int(d * n) for d in (0.5, 0.3)]
    for density, gamma in [(0.5, 0.15), (0.6, 0.2), (0.5, 0.01)]:
        top = int(gamma * n)
        ranks += [n - int(density * n) - top, n - top]
    return any(0 < r < n and order[r - 1] == order[r] for r in ranks)


def varies_alike_at_an_edge(deltas):
    """The same of `sce`, which selects half of the positions that vary."""
    varies = torch.stack(deltas).var(dim=0, unbiased=False).flatten()
    order, kept = varies.float().sort(descending=True).values, int((varies != 0).sum() * 0.5)
    return kept > 0 and order[kept - 1] == order[kept]


def models(tied, dtype):
    generator = torch.Generator().manual_seed(11)
    draw = lambda shape: torch.randn(shape, generator=generator)
    found = {model: {} for model in ["base", "a", "b", "c"]}

    def tune(base, shared):
        while True:
            delta = 0.15 * shared + 0.3 * draw(base.shape) * torch.rand(base.shape, generator=generator) ** 2
            # Some elements are left as they are, as in a sparse fine-tune.
            model = (base + delta * (torch.rand(base.shape, generator=generator) > 0.15)).to(dtype)
            if not tied_at_an_edge(model - base):
                return model

    for name, shape in tensors(tied).items():
        base = (0.5 * draw(shape) + (1.0 if len(shape) == 1 else 0.0)).to(dtype)
        while True:
            shared = draw(shape)
            tuned = [tune(base, shared) for _ in "abc"]
            if not varies_alike_at_an_edge([t - base for t in tuned]):
                break
        for model, t in zip(found, [base] + tuned):
            found[model][name] = t
    return {m: {name: t.to(dtype).contiguous() for name, t in ts.items()} for m, ts in found.items()}


def config(tied, dtype):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 64, "tie_word_embeddings": tied, "torch_dtype": dtype,
    }


for tied in [False, True]:
    for dtype in ["float32", "bfloat16"]:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            out, inputs = {}, models(tied, getattr(torch, dtype))
            for model, ts in inputs.items():
                (root / model).mkdir()
                (root / model / "config.json").write_text(json.dumps(config(tied, dtype)))
                save_file(ts, root / model / "model.safetensors", metadata={"format": "pt"})
                out |= {f"{model}/{name}": t for name, t in ts.items()}
            for case, (method, base, names, globals_, own) in CASES.items():
                if tied and case not in TIED:
                    continue
                entries = []
                for model, weight in zip(names, WEIGHTS):
                    entry = {"model": str(root / model)}
                    if own is not None:
                        entry["parameters"] = ({} if method == "passthrough" else {"weight": weight}) | own
                    entries.append(entry)
                text = {"merge_method": method, "models": entries, "dtype": dtype, "parameters": globals_}
                if base:
                    text["base_model"] = str(root / base)
                try:
                    run_merge(MergeConfiguration.model_validate(yaml.safe_load(json.dumps(text))), str(root / case),
                              MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
                except Exception as error:
                    raise RuntimeError(f"{case} {dtype}: {error}") from error
                # arcee_fusion and ramplus_tl answer in f32 whatever was asked for.
                merged = load_file(next((root / case).glob("*.safetensors")))
                out |= {f"{case}/{name}": t.contiguous() for name, t in merged.items()}
            save_file(out, f"{'tied' if tied else 'untied'}_{dtype}.safetensors")
