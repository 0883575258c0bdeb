"""Runs the program's commands in forks of a process that has imported it, since the imports take seconds.

    with ForkServer() as server:
        done = server.run("main.py", "demo", "--list")  # as subprocess.run([sys.executable, "main.py", ...])

Each command is a process of its own, with its own environment, folder, exit code and output. Only what a library reads
when it is imported, as the hub's client reads HF_*, comes from the server's environment.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import REPO

SERVER = """
import atexit, json, os, runpy, signal, sys, threading, traceback
sys.path.insert(0, os.getcwd())
import datasets, matplotlib.pyplot, pandas, transformers
import export, main
from transformers import AutoTokenizer, GPT2LMHeadModel
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(job["timeout"])
    write = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    for path, flags, fd in ((os.devnull, os.O_RDONLY, 0), (job["out"], write, 1), (job["err"], write, 2)):
        os.dup2(os.open(path, flags), fd)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = job["args"]
    code = 0
    try:
        if sys.argv[0] == "-c":
            exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # freeing all modules takes seconds
"""


class ForkServer:
    """`env` is the environment of the server and, unless it gets another, of a command."""

    def __init__(self, env: dict | None = None, cwd: Path = REPO):
        self.env, self.cwd, self.folder = dict(os.environ if env is None else env), cwd, tempfile.TemporaryDirectory()
        self.warnings = Path(self.folder.name) / "stderr"
        with open(self.warnings, "w") as stderr:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
            self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=cwd, env=self.env, **pipes)

    def run(self, *args, env: dict | None = None, cwd: Path | None = None, timeout: int = 300):
        """`python ARGS`. What the imports print on stderr is part of each command's stderr."""
        out, err = (Path(self.folder.name) / name for name in ("out", "err"))
        job = dict(args=list(map(str, args)), env=self.env if env is None else env, cwd=str(cwd or self.cwd))
        self.process.stdin.write(json.dumps(job | dict(out=str(out), err=str(err), timeout=timeout)) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        assert code, self.warnings.read_text()
        return subprocess.CompletedProcess(
            args, int(code), out.read_text(), self.warnings.read_text() + err.read_text()
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()
        self.folder.cleanup()
