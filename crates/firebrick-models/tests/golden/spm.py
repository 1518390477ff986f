"""A small SentencePiece BPE model and what it makes of some texts, with and without a space in front.

Usage: spm.py TEXT > spm.json
"""
import io, json, sys
import sentencepiece as spm

TEXTS = ["the king said unto the people", "  two spaces, then\ta tab\nand a line", "Ünïcödé, 東京 🙂", "", " ", "a<user>b c",
         "123 + 456 = 579; (x) => x * 2", "in the beginning was the word" * 3]
text = open(sys.argv[1], encoding="utf-8").read()
out = {"source": f"sentencepiece {spm.__version__}", "texts": TEXTS, "models": []}
for prefix in (True, False):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<user>"], character_coverage=0.99, num_threads=1, minloglevel=2)
    p = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(p.vocab_size())
    kind = lambda i: 2 if p.is_unknown(i) else 3 if p.is_control(i) else 6 if p.is_byte(i) else 5 if p.is_unused(i) else 1
    types = [4 if p.id_to_piece(i) == "<user>" else kind(i) for i in ids]
    out["models"].append({"prefix": prefix, "pieces": [p.id_to_piece(i) for i in ids], "scores": [p.get_score(i) for i in ids],
                          "types": types, "ids": [p.encode(t) for t in TEXTS]})
print(json.dumps(out, ensure_ascii=False))
