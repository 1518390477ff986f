"""Merges small random Llama checkpoints by the configurations in cases.yml with mergekit 0.1.5.

Run as `python make_configs.py` in this folder. Writes the checkpoints to models/, all results to expected.safetensors (tensors are named
`case/tensor`), and to expected.json what their config.json and tokenizers say. `@` in a configuration stands for models/.
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
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

logging.disable(logging.WARNING)
HIDDEN, INNER = 4, 6
SPECIAL = ["<unk>", "<s>", "</s>"]
COMMON = {"tokens": [*"abcdefgh", "ab", "cd"], "merges": [("a", "b"), ("c", "d")]}
# name: seed, and what is not as in the others
MODELS = {
    "base": (1, COMMON),
    "a": (2, COMMON),
    "b": (3, COMMON),
    "wide": (4, {"tokens": [*"hgfedcbaxy", "cd", "xy"], "merges": [("c", "d"), ("x", "y")], "added": ["<tool>"], "template": "{{ messages }}"}),
    "narrow": (5, {"tokens": [*"abcz", "ab"], "merges": [("a", "b")]}),
    "padded": (6, {**COMMON, "rows": 20}),
    "deep": (7, {**COMMON, "layers": 6}),
    "tied": (8, {**COMMON, "tied": True}),
    "tied_too": (9, {**COMMON, "tied": True}),
    "half": (10, {**COMMON, "dtype": torch.bfloat16}),
    "odd": (11, {"odd": True}),
    "odd_too": (12, {"odd": True}),
}


def shapes(layers, rows, tied):
    found = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for i in range(layers):
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
            found[f"model.layers.{i}.{name}.weight"] = shape
    found["model.norm.weight"] = (HIDDEN,)
    if not tied:
        found["lm_head.weight"] = (rows, HIDDEN)
    return found


def tokenizer(folder, tokens, merges, added, template):
    vocab = {token: i for i, token in enumerate(SPECIAL + tokens)}
    made = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens(added)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made.get_vocab_size()


def write(folder, seed, tokens=(), merges=(), added=(), template=None, rows=None, layers=4, tied=False, dtype=torch.float32, odd=False):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    if odd:
        # A family that transformers knows and mergekit does not.
        config = OPTConfig(
            hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=HIDDEN, vocab_size=9,
            max_position_embeddings=6, architectures=["OPTForCausalLM"], dtype="float32",
        )
        found = {name: value.shape for name, value in OPTForCausalLM(config).state_dict().items() if name != "lm_head.weight"}
        config = config.to_diff_dict() | {"model_type": "opt", "tie_word_embeddings": True}
    else:
        rows = rows or tokenizer(folder, list(tokens), list(merges), list(added), template)
        tokenizer(folder, list(tokens), list(merges), list(added), template)
        found = shapes(layers, rows, tied)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": rows,
            "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
            "hidden_act": "silu", "torch_dtype": str(dtype).split(".")[1], "bos_token_id": 1, "eos_token_id": 2,
        }
    save_file({k: torch.randn(s, generator=generator).to(dtype) for k, s in found.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def main():
    here = Path(__file__).parent
    models = here / "models"
    for name, (seed, what) in MODELS.items():
        write(models / name, seed, **what)
    results, said = {}, {}
    for case in (here / "cases.yml").read_text().split("\n---\n"):
        config = yaml.safe_load(case.replace("@", f"{models.resolve()}/"))
        name = config.pop("name")
        with tempfile.TemporaryDirectory() as out:
            run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(quiet=True))
            for file in Path(out).glob("*.safetensors"):
                results |= {f"{name}/{key}": value for key, value in load_file(file).items()}
            written = json.loads((Path(out) / "config.json").read_text())
            said[name] = {key: written[key] for key in ["num_hidden_layers", "vocab_size", "tie_word_embeddings"] if key in written}
            if "tokenizer" in config or "tokenizer_source" in config:
                said[name]["tokens"] = AutoTokenizer.from_pretrained(out).get_vocab()
    save_file(results, here / "expected.safetensors")
    (here / "expected.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


main()
