"""Kill `python main.py demo` again and again, and compare what it comes to with a run that nobody killed.

    python tests/kill_and_resume.py [--kills N] [--seed N] [--cut SHARE]

Every process is started with the same command and gets SIGKILL (now and then SIGTERM or SIGINT) at a random instant
after its training has begun; checkpoints and evaluations are so frequent that many hit one. After some of them (--cut,
the share) the newest checkpoint is damaged, too. The last process is let finish. Then weights, metrics and results have
to be the same to the bit. Exit code 1 if they are not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OVERRIDES = ["num_tokens=40_000", "batch_size=512", "eval_tokens=1024", "dict_size=64", "top_k_aux=16"]
OVERRIDES += ["n_batches_to_dead=3", "num_batches_in_buffer=2", "checkpoint_freq=3", "log_freq=2", "perf_log_freq=5"]


def command(output_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(REPO / "main.py"), "demo", *OVERRIDES, *overrides, f"output_dir={output_dir}"]


def environment() -> dict:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HF_"))}
    return env | {"HF_ENDPOINT": "http://127.0.0.1:9", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


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


def kill_once(args: list[str], output_dir: Path, how: int, delay: float) -> str:
    """Start, wait until training is under way, wait `delay` seconds, kill. Says what the kill hit."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(args, env=environment(), stdout=log, stderr=log, cwd=REPO)
        before = marks(output_dir)
        while process.poll() is None and marks(output_dir) == before:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(how)
        code = process.wait(timeout=120)
        log.seek(0)
        output = log.read()
    expected = -signal.SIGKILL if how == signal.SIGKILL else 4
    if code == 0:
        return "nothing: it had finished"
    if code != expected:
        raise SystemExit(f"exit code {code} instead of {expected}:\n{output}")
    if how != signal.SIGKILL:
        return f"{signal.Signals(how).name}, exit code {code}"
    saving = any(output_dir.glob("*/groups/*/*.tmp"))
    finishing = any(output_dir.glob("*/*/sae*"))
    return "a save" if saving else "the final evaluation or after" if finishing else "a step or an evaluation"


def marks(output_dir: Path) -> tuple:
    """What changes when training gets on."""
    return tuple(sorted((str(p), p.stat().st_size) for p in output_dir.glob("*/*/metrics.jsonl") if p.exists()))


def damage_newest(output_dir: Path, rng: random.Random) -> str | None:
    """Flip a byte, cut off or delete a file of the newest checkpoint, if there is another to fall back on."""
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


def kill_and_resume(folder: Path, signals: list[int], rng: random.Random, cut: float, *overrides, say=print) -> list:
    """The names of what differs from the run that nobody killed, after a process for each of the signals."""
    subprocess.run(command(folder / "whole", *overrides), env=environment(), cwd=REPO, check=True, capture_output=True)
    hits, args = Counter(), command(folder / "killed", *overrides)
    for how in signals:
        hit = kill_once(args, folder / "killed", how, rng.uniform(0, 2))
        say(f"{hits.total() + 1}: hit {hit}")
        if hit.startswith("nothing"):
            break
        hits[hit] += 1
        if rng.random() < cut and (what := damage_newest(folder / "killed", rng)):
            say(f"   and {what}")
    done = subprocess.run(args, env=environment(), cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    whole, killed = digests(folder / "whole"), digests(folder / "killed")
    say(f"{hits.total()} kills hit: {', '.join(f'{what} {count}' for what, count in hits.items())}")
    return [name for name in sorted({*whole, *killed}, key=str) if whole.get(name) != killed.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cut", type=float, default=0.2)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    signals = rng.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), weights=(8, 1, 1), k=args.kills)
    with tempfile.TemporaryDirectory() as folder:
        for sweep, first in enumerate(range(0, args.kills, 9)):  # each sweep gets a few, then finishes
            some = signals[first : first + 9]
            if different := kill_and_resume(Path(folder) / str(sweep), some, rng, args.cut, f"seed={sweep}"):
                sys.exit(f"sweep {sweep}: not the same: {different}")
            print(f"sweep {sweep}: the same to the bit", flush=True)


if __name__ == "__main__":
    main()
