"""Cost of a checkpoint of the paper's sweep: how long it blocks training, and its size on disk.

    python benchmarks/checkpoint_cost.py [--folder DIR] [--repeats N]

Builds the 15 SAEs of the sweep with their optimizers (about 7 GiB of memory), takes one training step with each, and
writes checkpoints as training does: flushes them, reads them back and deletes old ones.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import machine, median_and_range

from checkpoint import MAX_CHECKPOINT_INTERVAL, load_checkpoint, save_checkpoint
from config import get_default_cfg
from main import sweep_configs
from sae import SAE_CLASSES
from training_step import Run, make_optimizer, training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write them (default: the system's temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.repeats)


def measure(folder: Path, repeats: int) -> None:
    x = torch.randn(4096, 768)
    runs, step_seconds = [], 0.0
    for cfg in sweep_configs("paper", {"device": "cpu"}):
        sae = SAE_CLASSES[cfg["sae_type"]](cfg)
        runs.append(Run(cfg, sae, make_optimizer(sae, cfg), log=None))
        started = time.perf_counter()
        training_step(sae, runs[-1].optimizer, x, cfg)
        step_seconds += time.perf_counter() - started
    seconds = []
    for step in range(1, repeats + 1):
        started = time.perf_counter()
        state = {"step": step, "seconds": 0.0, "stream": {}, "logged": {}, "provenance": {}}
        state["runs"] = [run.cfg["name"] for run in runs]
        save_checkpoint(folder, runs, state, keep=2)
        seconds.append(time.perf_counter() - started)
    path = max(folder.glob("step_*[0-9]"))
    started = time.perf_counter()
    load_checkpoint(path, json.loads((path / "state.json").read_text()), runs)
    loading = time.perf_counter() - started
    size = sum(file.stat().st_size for file in path.iterdir()) / 2**30
    took, freq = statistics.median(seconds), get_default_cfg()["checkpoint_freq"]
    print(f"{machine()}: {len(runs)} SAEs")
    print(f"a checkpoint: {size:.2f} GiB, {median_and_range(seconds, '.1f')} s; loading {loading:.1f} s")
    interval = MAX_CHECKPOINT_INTERVAL
    print(f"a step of all SAEs: {step_seconds:.1f} s. Checkpoints take", end=" ")
    print(f"{took / (freq * step_seconds + took):.3%} of the time if written every {freq:,} steps,", end=" ")
    print(f"{took / max(interval, 50 * took):.2%} if every {interval / 60:.0f} minutes")


if __name__ == "__main__":
    main()
