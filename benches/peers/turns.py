"""Turns with the benchmark: once warm, do the work once for each line `go` on stdin, and say how long it took.

The protocol is one JSON object a line: {"peer": NAME} when ready or {"missing": WHY}, then {"seconds": S} after each turn.
"""

import json
import os
import sys
import time

_out = os.fdopen(os.dup(1), "w")
# What libraries print would break the protocol: it goes where errors go.
os.dup2(2, 1)


def _say(**line):
    print(json.dumps(line), file=_out, flush=True)


def missing(error):
    """This peer is not installed here."""
    _say(missing=str(error))
    sys.exit(0)


def take_turns(name, work, prepare=lambda: None, warm_ups=3):
    """`prepare` is done before each call of `work`, and is not timed; where `work` returns its own seconds, those count. The first `warm_ups` calls are not told."""
    for _ in range(warm_ups):
        prepare()
        work()
    _say(peer=name)
    while sys.stdin.readline():
        prepare()
        begin = time.perf_counter()
        own = work()
        _say(seconds=time.perf_counter() - begin if own is None else own)
