"""A small BERT with random weights and what transformers computes with it: writes bert/ and bert.json beside this file."""
import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel

here = Path(__file__).parent
folder = here / "bert"
words = "[PAD] [UNK] [CLS] [SEP] [MASK] the a fire brick wall house river runs stands on by of old red ##s ##ing ##er build burn , . ?".split()
vocab = {word: i for i, word in enumerate(words)}
config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=12, type_vocab_size=2,
                    pad_token_id=0)
torch.manual_seed(0)
model = BertModel(config).eval()
with torch.no_grad():
    # Larger than BERT's own start, so that attention, GELU and norms have something to do.
    for name, p in sorted(model.named_parameters()):
        p.copy_(torch.randn_like(p) * 0.4 + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
model.save_pretrained(folder)

tok = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
tok.normalizer = normalizers.BertNormalizer(lowercase=True)
tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tok.decoder = decoders.WordPiece()
tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
(folder / "tokenizer.json").write_text(tok.to_str(pretty=False) + "\n")
names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}) + "\n")
models = "sentence_transformers.models"
kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
(folder / "modules.json").write_text(json.dumps([{"idx": i, "name": str(i), "path": p, "type": f"{models}.{t}"} for i, (p, t) in enumerate(kinds)]) + "\n")
(folder / "1_Pooling").mkdir(exist_ok=True)
modes = {"cls_token": False, "mean_tokens": True, "max_tokens": False, "mean_sqrt_len_tokens": False}
(folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **{f"pooling_mode_{k}": v for k, v in modes.items()}}) + "\n")
(folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10, "do_lower_case": False}) + "\n")

LIMIT = 10
TEXTS = [
    "The old bricks",
    "fire",
    "A river runs by the red house.",
    "",
    "Builders, burning walls? zebra",
    "the fire burns on the wall of the old red brick house by the river",
]


def rounded(t):
    return [round(v, 6) for v in t.flatten().tolist()]


tok.enable_truncation(LIMIT)
with torch.no_grad():
    cases = []
    ids = [tok.encode(text).ids for text in TEXTS]
    for text, i in zip(TEXTS, ids):
        o = model(torch.tensor([i]), output_hidden_states=True)
        cases.append({"text": text, "ids": i, "hidden": [rounded(h) for h in o.hidden_states], "pooler": rounded(o.pooler_output)})
    longest = max(map(len, ids))
    tokens = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    hidden = model(tokens, attention_mask=mask).last_hidden_state
    unmasked = model(tokens).last_hidden_state
    m = mask[:, :, None].float()
    mean = (hidden * m).sum(1) / m.sum(1)
    pooled = {"mean": mean, "cls": hidden[:, 0], "max": hidden.masked_fill(m == 0, float("-inf")).max(1).values, "unmasked_mean": unmasked.mean(1)}
    pair = tok.encode("the old wall", "fire")
    pair_hidden = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids])).last_hidden_state
# What llama.cpp's converter calls the tensors; it leaves the pooler out.
name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
names = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}
out = {"source": "transformers 5.23.0, torch 2.15.0", "cases": cases, "pooled": {k: [rounded(r) for r in v] for k, v in pooled.items()},
       "gguf_names": {hf: ggml for hf, ggml in names.items() if ggml}, "pair": {"ids": pair.ids, "types": pair.type_ids, "hidden": rounded(pair_hidden)}}
(here / "bert.json").write_text(json.dumps(out) + "\n")
