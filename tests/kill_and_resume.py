"""Kill and resume `python main.py demo` many times, and compare its results with those of an uninterrupted run.

    python tests/kill_and_resume.py [--kills N] [--others N] [--seed N] [--cut SHARE] [--ranks N] [KEY=VALUE ...]

Every process is started with the same command and gets SIGKILL (a few others SIGTERM or SIGINT) at a random time after
its training has begun, or at the first time from there on at which it saves or evaluates. What it was doing is read
from its stack, which it dumps on SIGUSR1 just before it dies. After some of the kills (--cut, the share) the newest
checkpoint is corrupted. The last process finishes. Then weights, metrics and results must be bit-identical. Exit code 1
if they are not.

With --ranks the processes are started by torchrun, 1 to N of them at random. SIGKILL goes to a random rank, the other
signals to torchrun. The uninterrupted run is a single process.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
OVERRIDES = ["num_tokens=40_000", "batch_size=512", "eval_tokens=1024", "dict_size=64", "top_k_aux=16"]
# What a kill interrupts, by the function that the process is in.
PHASES = dict(save_checkpoint="a save", save_sae="a save", finish="a save", evaluate="an evaluation")
PHASES |= dict(heldout_baseline="the baseline", launch_step="a step", next_batch="a harvest")
OVERRIDES += ["n_batches_to_dead=3", "num_batches_in_buffer=2", "checkpoint_freq=3", "log_freq=2", "perf_log_freq=5"]


# faulthandler dumps the stack in C, immediately, without side effects.
DUMPING = """
import faulthandler, runpy, signal, sys
faulthandler.register(signal.SIGUSR1, open(sys.argv.pop(1), "a"), False)
runpy.run_path("main.py", run_name="__main__")
"""
TORCHRUN = "from torch.distributed.run import main; main()"


def command(output_dir: Path, *overrides: str) -> list[str]:
    return ["main.py", "demo", *OVERRIDES, *overrides, f"output_dir={output_dir}"]


def start(args: list[str], log: Path, program=None, ranks: int = 0, dump: Path | None = None):
    """Start `python ARGS`, or with `ranks`, torchrun with so many processes. With `program`, a ForkServer, all are
    forks. With `dump`, the process appends its stack to this file on SIGUSR1.
    """
    if ranks:
        forks = ["--run-path", "--start-method=fork"] if program else []
        args = ["-c", TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", *forks, str(REPO / args[0]), *args[1:]]
    elif dump:
        args = ["-c", DUMPING, str(dump), *args[1:]]
    if program:
        return program.start(*args, out=log, err=log, env=environment(), figures=bool(ranks))
    with open(log, "a") as output:
        return subprocess.Popen([sys.executable, *args], env=environment(), stdout=output, stderr=output, cwd=REPO)


def run(args: list[str], log: Path, program=None, ranks: int = 0) -> None:
    """Exits if the command fails."""
    if code := start(args, log, program, ranks).wait(timeout=600):
        raise SystemExit(f"exit code {code}:\n{log.read_text()}")


def environment() -> dict:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HF_"))}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return env | {"GLOO_SOCKET_IFNAME": "lo"}


def digests(output_dir: Path) -> dict:
    """Of every run: the SHA-256 of its weights and of its metrics, and its result without the time it took."""
    found = {}
    for folder in sorted(path.parent for path in output_dir.glob("*/*/config.json")):
        for file in ("sae/sae_weights.safetensors", "metrics.jsonl"):
            content = (folder / file).read_bytes() if (folder / file).exists() else b""
            found[folder.name, file] = hashlib.sha256(content).hexdigest()
        result = folder / "result.json"
        result = json.loads(result.read_text()) if result.exists() else {}
        found[folder.name, "result"] = {key: value for key, value in result.items() if key != "seconds"}
    return found


def kill_once(
    args: list[str], output_dir: Path, how: int, delay: float, wanted: str, ranks: int, rank: int, program
) -> str:
    """Start, wait until training has begun, `delay` seconds more, and until the process does what is wanted; kill.
    Returns what the kill interrupted. With `ranks`, torchrun is started, and `rank` is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump, output = Path(folder) / "stack", Path(folder) / "output"
        process = start(args, output, program, ranks, dump)
        before = marks(output_dir)
        while process.poll() is None and marks(output_dir) == before:
            time.sleep(0.02)
        time.sleep(delay)
        if ranks:
            while process.poll() is None and not any(output_dir.glob("*/groups/*/step_*[0-9]")):
                time.sleep(0.02)
            return kill_rank(process, rank, how, output)
        at = ""
        while process.poll() is None and (not at or wanted not in at):
            time.sleep(0.005)
            at = what_it_is_at(process, dump)
        process.send_signal(how)
        code = process.wait(timeout=120)
        expected = -signal.SIGKILL if how == signal.SIGKILL else 4
        if code in (0, -signal.SIGUSR1):  # Python removes its handlers at exit
            return "nothing: it had finished"
        if code != expected:
            raise SystemExit(f"exit code {code} instead of {expected}:\n{output.read_text()}")
    return f"{at} ({signal.Signals(how).name})"


def kill_rank(launcher, rank: int, how: int, output: Path) -> str:
    """Kill a rank by SIGKILL, or send another signal to torchrun. Within a minute all ranks must have ended."""
    try:
        ranks = psutil.Process(launcher.pid).children()
        (ranks[rank] if how == signal.SIGKILL else launcher).send_signal(how)
    except (psutil.Error, IndexError):
        ranks = []
    code = launcher.wait(timeout=60)
    if any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks):
        raise SystemExit(f"torchrun has ended, and a rank has not:\n{output.read_text()}")
    if code == 0:
        return "nothing: it had finished"
    return f"rank {rank} of {len(ranks)} ({signal.Signals(how).name})"


def what_it_is_at(process, dump: Path) -> str:
    """What the process is doing, from the innermost function of PHASES on its main thread's stack."""
    with open(dump) as file:
        file.seek(0, os.SEEK_END)
        stack, asked = "", 0.0
        while process.poll() is None and not stack.endswith(("in <module>\n", "  ...\n")):  # at most 100 frames
            if time.monotonic() - asked > 0.2:  # repeated: another thread may receive it and ignore it
                process.send_signal(signal.SIGUSR1)
                asked = time.monotonic()
            time.sleep(0.0002)
            stack += file.read()
    names = re.findall(r" in (\w+)$", stack, re.MULTILINE)
    return next((PHASES[name] for name in names if name in PHASES), "something else")


def marks(output_dir: Path) -> tuple:
    """Changes whenever training makes progress."""
    return tuple(sorted((str(p), p.stat().st_size) for p in output_dir.glob("*/*/metrics.jsonl") if p.exists()))


def corrupt_newest(output_dir: Path, rng: random.Random) -> str | None:
    """Flip a bit in, truncate or delete a file of the newest checkpoint, if there is another one."""
    paths = sorted(output_dir.glob("*/groups/*/step_*[0-9]"), key=lambda path: path.name)
    if len(paths) < 2:
        return None
    file = rng.choice(sorted(paths[-1].iterdir()))
    content = bytearray(file.read_bytes())
    what = rng.choice(("a flipped byte in", "a cut", "a missing"))
    at = rng.randrange(len(content))
    if what == "a missing":
        file.unlink()
    elif what == "a cut":
        file.write_bytes(content[:at])
    else:
        content[at] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{what} {file.name}"


def kill_and_resume(
    folder: Path, kills: list[tuple], rng: random.Random, cut: float, *overrides, delay=3.0, ranks=0, program=None
) -> Counter:
    """Kill a process for each (signal, what it must be doing, number of ranks), and let the last one finish, by
    torchrun if it has `ranks`. Returns how often what was interrupted. Exits if the results differ from those of an
    uninterrupted run. With `program`, a ForkServer, all processes are forks.
    """
    run(command(folder / "whole", *overrides), folder / "log", program)
    args, hits = command(folder / "killed", *overrides), Counter()
    for how, wanted, number in kills:
        rank = rng.randrange(number) if number else -1
        hit = kill_once(args, folder / "killed", how, rng.uniform(0, delay), wanted, number, rank, program)
        print(f"   {hit}", flush=True)
        if hit.startswith("nothing"):
            break
        hits[hit] += 1
        if rng.random() < cut and (what := corrupt_newest(folder / "killed", rng)):
            print(f"      and {what}", flush=True)
            hits["a corrupt checkpoint"] += 1
    run(args, folder / "log", program, ranks)
    whole, killed = digests(folder / "whole"), digests(folder / "killed")
    if different := [name for name in sorted({*whole, *killed}, key=str) if whole.get(name) != killed.get(name)]:
        raise SystemExit(f"different from the uninterrupted run: {different}")
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="by SIGKILL (default: 25)")
    parser.add_argument("--others", type=int, default=4, help="by SIGTERM or SIGINT (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cut", type=float, default=0.2)
    parser.add_argument("--ranks", type=int, default=0, help="start by torchrun, with up to so many processes")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more of the runs' config")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # A third each: at any time, in a save, in an evaluation.
    kills = [(signal.SIGKILL, ("", "save", "evaluation")[i % 3]) for i in range(args.kills)]
    kills += [(rng.choice((signal.SIGTERM, signal.SIGINT)), "") for _ in range(args.others)]
    kills = [(*kill, rng.randint(1, args.ranks) if args.ranks else 0) for kill in kills]
    rng.shuffle(kills)
    hits, sweep = Counter(), 0
    while kills:  # each sweep gets a few, then finishes
        some = kills[:8]
        print(f"sweep {sweep}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            hit = kill_and_resume(Path(folder), some, rng, args.cut, f"seed={sweep}", *args.overrides, ranks=args.ranks)
        del kills[: max(1, sum(hit.values()) - hit["a corrupt checkpoint"])]
        hits, sweep = hits + hit, sweep + 1
        print("   bit-identical to the uninterrupted run", flush=True)
    if sum(count for hit, count in hits.items() if "SIGKILL" in hit) < args.kills / 2:
        sys.exit("too many processes finished before they could be killed")
    print(f"{sweep} sweeps, hit: {', '.join(f'{what} {count}' for what, count in sorted(hits.items()))}")


if __name__ == "__main__":
    main()
