"""Makes corpus/: for each target a few small inputs; those called ok-* are accepted."""

import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).parent / "corpus"


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(data, str):
        data = data.encode()
    (folder / name).write_bytes(data)


def safetensors(header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSORS = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [16, 20]},
    "n": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
    "e": {"dtype": "F16", "shape": [0, 3], "data_offsets": [28, 28]},
}
put("safetensors", "ok-types", safetensors(TENSORS, bytes(28)))
put("safetensors", "ok-empty", safetensors({}, b""))
put("safetensors", "gap", safetensors({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, bytes(2)))


def string(text):
    text = text.encode()
    return struct.pack("<Q", len(text)) + text


def value(v):
    """Type and bytes of a metadata value."""
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, string(v)
    kinds = {value(x)[0] for x in v} or {4}
    assert len(kinds) == 1
    return 9, struct.pack("<IQ", kinds.pop(), len(v)) + b"".join(value(x)[1] for x in v)


def gguf(keys, tensors, alignment=32):
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, v in keys.items():
        kind, data = value(v)
        out += string(key) + struct.pack("<I", kind) + data
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        out += string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", kind, len(data))
        data += content
    return out + bytes(-len(out) % alignment) + data


TOKENS = ["<s>", "</s>", "t", "h", "e", "\u0120", "f", "o", "x", "th", "the", "\u0120f"]
MERGES = ["t h", "th e", "\u0120 f"]
MODEL = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
WEIGHTS = {
    "token_embd.weight": ([12, 8], 0, bytes(12 * 8 * 4)),
    "q": ([1, 32], 8, bytes(34)),
    "h": ([3], 1, bytes(6)),
}
put("gguf", "ok-model", gguf(MODEL, WEIGHTS))
put("gguf", "ok-empty", gguf({}, {}))
put("gguf", "ok-aligned", gguf({"general.alignment": 64, "a": [["x"], ["y", "z"]], "b": [True]}, {"w": ([2], 0, bytes(8))}, 64))
put("gguf", "cut", gguf(MODEL, WEIGHTS)[:300])

put("sharded_index", "ok-two", json.dumps({"metadata": {"total_size": 2}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
put("sharded_index", "outside", '{"weight_map":{"x":"../a.safetensors","y":"/b"}}')
put("sharded_index", "swapped", '{"weight_map":{"x":"b.safetensors","y":"a.safetensors"}}')

put("plan_toml", "ok-rules", 'version = 1\nmodel = "m"\n\n[[rules]]\nselect = "layers.*.attn.{q,v}"\nrank = 8\nalpha = 16.0\ndropout = 0.1\n\n[[rules]]\nselect = "layers.-1.mlp"\nbits = 3\ngroup = 64\nfrozen = true\nlearning_rate = 1e-4\n[rules.extra]\nx = { y = [1, "z"] }\n')
put("plan_toml", "ok-empty", "version = 1\n")
put("plan_toml", "wrong", 'version = 2\nrulez = 1\n[[rules]]\nselect = "atn"\nrank = 0\nbits = 99\ndensity = nan\n')
put("plan_json", "ok-rules", '{"version": 1, "rules": [{"select": "re:q_proj", "rank": 2, "weight": -0.5, "density": 0.3}, {"select": "*", "experts": 4, "top_k": 2, "drop": false, "extra": {"a": null}}]}')
put("plan_json", "wrong", '{"version": "1", "rules": [[], {"select": 3, "rank": 1.5}]}')

for i, text in enumerate([
    "*", "layers.3", "layers.{0,-2--1}.attn", "layers.*.attn.{q, v}!", "mlp.experts.0-3.up", "embed, head, norm!",
    r"re:layers\.(0|1)\..*_proj\.weight$", "layers.0-1.mlp.*, attn_norm", "block", "experts.*",
]):
    put("selector", f"ok-{i}", text)
put("selector", "wrong", "layers.{0-,atn.q,mlp.experts.-1")

put("mergekit", "ok-linear", "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 0.3}\n  - model: {model: {path: b}}\n    parameters:\n      weight:\n        - filter: self_attn\n          value: [0, 0.5, 1]\n        - value: 0.7\ndtype: bfloat16\nparameters: {normalize: true}\n")
put("mergekit", "ok-arithmetic", "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, lambda: 0.5}\nnumerics: mergekit\n")
put("mergekit", "anchors", "a: &a [1, 2]\nb: *a\nmerge_method: linear\nmodels: []\n<<: {x: 1}\n")

put("adapter_config", "ok-lora", json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"q_.*": 4.5}, "bias": "none", "use_rslora": True}))
put("adapter_config", "wrong", '{"peft_type":"LORA","r":2,"use_dora":true,"modules_to_save":["x"],"rank_pattern":{"((":1}}')

put("model_config", "ok-llama", json.dumps({"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 512, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "norm_placement": "peri", "initializer_range": 0.02}))
put("model_config", "wrong", '{"model_type":5,"vocab_size":-1,"hidden_size":1.5,"rope_scaling":[],"rms_norm_eps":"x"}')

keys = [b"gpt2", b"smollm", "\n".join(TOKENS).encode(), "\n".join(MERGES).encode(), b"33" + b"1" * 10, b"{{ 1 }}", bytes([0, 1, 1])]
put("gguf_tokenizer", "ok-all", b"\0".join(keys[:6]) + b"\0" + keys[6])
put("gguf_tokenizer", "ok-qwen", b"\0".join([b"gpt2", b"qwen2", keys[2], keys[3], b"", b"", b"\0\1\1\1\0\0\1"]))
put("gguf_tokenizer", "wrong", b"\0".join([b"gpt2", b"nobody", b"a\na", b"ab", b"1"]))

BPE = {"type": "BPE", "vocab": {t: i for i, t in enumerate(TOKENS)}, "merges": [m.split(" ") for m in MERGES]}
JSON = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "e"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": BPE,
}
put("tokenizer_json", "ok-bpe", json.dumps(JSON))
put("tokenizer_json", "ok-words", json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"the": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}))
put("tokenizer_json", "wrong", '{"model":{"type":"BPE","vocab":{"a":-1},"merges":["a"]}}')

put("chat_template", "ok-chatml", "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message.content | trim ~ '<|im_end|>' }}\n{% endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
put("chat_template", "ok-macros", "{% macro show(m, w=2) %}{{ m | tojson(indent=w) | indent(w) }}{% endmacro %}{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% if loop.first %}{% set ns.l = ns.l + [m] %}{% elif not ns.n %}{{ show(m) }}{% endif %}{% set ns.n = ns.n + loop.index * 2 %}{% endfor %}{{ ns.l[-1]['content'][::-1] ~ ', '.join(['a', 'b']) | replace('a', 'c') }}{% generation %}{{ bos_token }}{% endgeneration %}")
put("chat_template", "wrong", "{{ raise_exception('no') }}{% for i in range(9) %}")
