"""Runs the scripts beside it, one a line from standard input, in one process: importing torch takes longer than most of them.

A line is `[DIRECTORY, SCRIPT, ARGUMENTS...]` in JSON; the answer is one line, `{"out": TEXT}` or `{"error": TRACEBACK}`.
"""
import contextlib, io, json, os, runpy, sys, traceback

here = os.path.dirname(os.path.abspath(__file__))
# What libraries print through the file descriptor must not come between the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    directory, script, *arguments = json.loads(line)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(os.path.join(here, script), run_name="__main__")
        answer = {"out": out.getvalue()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
