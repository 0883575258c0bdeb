"""Runs the program's commands in forks of a process that has imported the libraries, since these imports take seconds.

    with ForkServer(env) as server:
        done = server.run("main.py", "demo", "--list")  # as subprocess.run([sys.executable, "main.py", ...])
        process = server.start("main.py", "demo", out=log, err=log)  # as subprocess.Popen

Each command is a process of its own, with its own environment, folder, exit code and output, and imports the program's
own modules itself. Only what a library reads when it is imported, as the hub's client reads HF_*, comes from the
server's environment. The fixture `program` is the server that tests share.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import REPO

SERVER = """
import atexit, json, os, runpy, signal, sys, threading, traceback
import datasets, matplotlib.pyplot, pandas, torch.distributed.run, wandb
import transformer_lens.model_bridge, transformer_lens.supported_models
from transformers import AutoTokenizer, GPT2LMHeadModel

def run(args, env, cwd, out, err, timeout, figures):
    signal.alarm(timeout)
    write = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    for path, flags, fd in ((os.devnull, os.O_RDONLY, 0), (out, write, 1), (err, write, 2)):
        os.dup2(os.open(path, flags), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = args
    code = 0
    try:
        if not figures:
            sys.path[0] = cwd
            import results
            results.draw_results = lambda *_: None
        if sys.argv[0] == "-c":
            sys.path[0] = cwd
            exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
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

for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if "wait" in job:
        pid, status = os.waitpid(job["wait"], job["options"])
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        run(**job)
os._exit(0)
"""


class Forked:
    """A command that a ForkServer has started, with the methods of subprocess.Popen that tests need."""

    def __init__(self, server: "ForkServer", pid: int):
        self.server, self.pid, self.returncode = server, pid, None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.request(dict(wait=self.pid, options=options))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return self.poll(0)
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """`env` is the environment of the server and, unless it gets another, of a command."""

    def __init__(self, env: dict):
        self.env, self.folder = dict(env), tempfile.TemporaryDirectory()
        self.warnings = Path(self.folder.name) / "stderr"
        with open(self.warnings, "w") as stderr:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
            self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=self.env, **pipes)

    def request(self, job: dict):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.warnings.read_text()
        return json.loads(answer)

    def start(
        self, *args, out: Path, err: Path, env: dict | None = None, cwd: Path = REPO, timeout=300, figures=True
    ) -> Forked:
        """Start `python ARGS`. Its output is appended to the files `out` and `err`. After `timeout` s it is ended.
        Without `figures`, main.py does not draw the results, which takes longer than to train a small sweep.
        """
        for path in (out, err):
            path.touch()
        job = dict(args=list(map(str, args)), env=self.env if env is None else env, cwd=str(cwd), timeout=timeout)
        return Forked(self, self.request(job | dict(out=str(out), err=str(err), figures=figures)))

    def run(self, *args, **how) -> subprocess.CompletedProcess:
        """`python ARGS`. What the imports print on stderr is part of each command's stderr."""
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            code = self.start(*args, out=out, err=err, **how).wait()
            stderr = self.warnings.read_text() + err.read_text()
            return subprocess.CompletedProcess(args, code, out.read_text(), stderr)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()
        self.folder.cleanup()
