"""What `firebrick eval` reports, one sequence at a time with transformers.

Usage: evaluate.py MODEL REFERENCE TEXT WINDOW STRIDE SAMPLES.jsonl
"""
import json, math, sys
from collections import defaultdict
import torch
from common import load


def log_probs(model, windows):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=windows).logits.double(), -1)


def strided(model, ids, window, stride):
    """As in transformers' documentation, but for the mean: over tokens."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        x = torch.tensor([ids[begin:end]])
        labels = x.clone()
        labels[:, :-(end - before)] = -100
        with torch.no_grad():
            loss = model(input_ids=x, labels=labels).loss.double().item()
        scored = (labels[0, 1:] != -100).sum().item()
        total, count, before = total + loss * scored, count + scored, end
        if end == len(ids):
            return {"mean_nll": total / count, "tokens": count}


def distance(model, reference, ids, window):
    windows = torch.tensor(ids[:len(ids) // window * window]).view(-1, window)
    q, p = log_probs(model, windows[:, :-1]), log_probs(reference, windows[:, :-1])
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    y = windows[:, 1:].unsqueeze(-1)
    difference = (p.gather(-1, y) - q.gather(-1, y)).flatten()
    ratio = difference.mean().exp().item()
    return {
        "tokens": len(kl), "mean_kl": kl.mean().item(), "max_kl": kl.max().item(),
        "median_kl": kl.quantile(0.5).item(), "p99_kl": kl.quantile(0.99).item(),
        "top1_agreement": agree.mean().item(), "perplexity_ratio": ratio,
        "perplexity_ratio_standard_error": ratio * (difference.std() / len(difference) ** 0.5).item(),
    }


def encode_pair(tokenizer, context, text):
    """lm-evaluation-harness: the white space between the two belongs to what follows."""
    encode = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]
    head = context.rstrip()
    given = encode(head)
    return given, encode(context + text)[len(given):]


def continuations(model, pairs):
    """Log-likelihood of the second part of each pair of ids; the sequences are filled up on the right, which none sees."""
    found, order = [0.0] * len(pairs), sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    for at in range(0, len(order), 64):
        batch = order[at:at + 64]
        rows = [pairs[i][0] + pairs[i][1] for i in batch]
        longest = max(map(len, rows))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([r + [0] * (longest - len(r)) for r in rows])).logits
        for k, i in enumerate(batch):
            first, end = len(pairs[i][0]), len(rows[k])
            table = torch.log_softmax(logits[k, first - 1:end - 1].double(), -1)
            found[i] = table.gather(1, torch.tensor(rows[k][first:]).unsqueeze(1)).sum().item()
    return found


def mean_and_error(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def tasks(model, tokenizer, path):
    found = {"items": 0, "sequences": 0, "largest_difference": 0.0, "control": 0.0, "results": {}}
    by_task = defaultdict(list)
    samples = [json.loads(line) for line in open(path)]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    pairs = [encode_pair(tokenizer, *pair) for s in samples for pair in s["arguments"]]
    alone = [(start, encode(text[1:])) for s in samples if "unconditional" in s for _, text in s["arguments"]]
    values, alone = iter(continuations(model, pairs)), iter(continuations(model, alone))
    for sample in samples:
        lls = [next(values) for _ in sample["arguments"]]
        bare = [next(alone) for _ in sample.get("unconditional", [])]
        ours = sample["filtered_resps"] + sample.get("unconditional", [])
        found["items"] += 1
        found["sequences"] += len(ours)
        found["largest_difference"] = max(found["largest_difference"], *(abs(a - b) for a, b in zip(lls + bare, ours)))
        # How far apart the choices are: what a difference that matters looks like.
        found["control"] = max(found["control"], max(lls) - min(lls))
        lengths = [len(text) - 1 for _, text in sample["arguments"]]
        best = lambda scores: scores.index(max(scores))
        by_length, by_context = [v / n for v, n in zip(lls, lengths)], [v - u for v, u in zip(lls, bare)] or [0]
        by_task[sample["task"]].append((sample["target"], best(lls), best(by_length), best(by_context)))
    for name, answers in by_task.items():
        r = found["results"][name] = {}
        for i, name in enumerate(["acc", "acc_norm", "acc_mutual_info"], 1):
            r[f"{name},none"], r[f"{name}_stderr,none"] = mean_and_error([float(a[0] == a[i]) for a in answers])
        f1 = []
        for label in {a for t, p, *_ in answers for a in (t, p)}:
            hits = sum(t == p == label for t, p, *_ in answers)
            f1.append(2 * hits / sum((t == label) + (p == label) for t, p, *_ in answers))
        r["macro_f1,none"] = sum(f1) / len(f1)
    return found


# A second thread waits for the first more than it helps on so small a model.
torch.set_num_threads(1)
folder, other, text, window, stride, samples = sys.argv[1:]
tokenizer, model = load(folder)
reference = load(other)[1]
ids = tokenizer(open(text).read(), add_special_tokens=False)["input_ids"]
print(json.dumps({
    "strided": strided(model, ids, int(window), int(stride)),
    "reference": distance(model, reference, ids, int(window)),
    "tasks": tasks(model, tokenizer, samples),
}))
