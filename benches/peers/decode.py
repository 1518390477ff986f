"""llama.cpp on a prompt of 512 tokens, or on 64 tokens after it: `decode.py FILE.gguf prompt|tokens THREADS`

Through llama-cpp-python, or through the server of xllamacpp, which times its own work.
"""

import json
import sys

from turns import missing, take_turns

PROMPT, TOKENS = 512, 64
path, what, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])


def by_calls(llama_cpp):
    model = llama_cpp.Llama(
        path, n_ctx=PROMPT + TOKENS, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = [i * 7919 % model.n_vocab() for i in range(PROMPT + TOKENS)]

    def prompt():
        model.reset()
        model.eval(ids[:PROMPT])

    def tokens():
        for token in ids[PROMPT:]:
            model.eval([token])

    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    return (name, prompt) if what == "prompt" else (name, tokens, prompt)


def by_server(xllamacpp):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_batch, params.n_parallel = 2 * PROMPT, PROMPT, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    # No vocabulary of ours is smaller.
    ids = [i * 7919 % 1000 for i in range(PROMPT)]
    request = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}

    def work():
        answer = server.handle_completions(request)
        times = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        assert (times["prompt_n"], times["predicted_n"]) == (PROMPT, TOKENS), times
        # The first token comes with the prompt; the time of one is that of the others.
        milliseconds = times["prompt_ms"] if what == "prompt" else TOKENS * times["predicted_per_token_ms"]
        return milliseconds / 1000

    return f"llama.cpp (xllamacpp {xllamacpp.__version__})", work


try:
    import llama_cpp

    turns = by_calls(llama_cpp)
except ImportError:
    try:
        import xllamacpp

        turns = by_server(xllamacpp)
    except ImportError:
        missing("neither llama-cpp-python nor xllamacpp")
take_turns(*turns)
