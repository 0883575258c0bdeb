"""Cost of training with several ranks: measured on this machine with gloo, and computed for GPUs.

    python benchmarks/distributed.py [--ranks 1 2 4] [--plot FILE]
    python benchmarks/distributed.py --computed [--harvest-ms 4.05] [--bandwidth 20] [--sync-ms 0.3] [--plot FILE]

The first measures what the ranks exchange, for batches of the paper's size, between processes on this machine. The
second computes the time of a batch for 1 to 64 GPUs. The steps of the SAEs and the harvest of a batch were measured on
one H200 (RESULTS.md). Assumptions: the bandwidth in GB/s at which a rank receives activations, the time to exchange
the flags after a step, and that nothing overlaps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import machine, markdown_table

import distributed

B, D, FORWARD, SEQ_LEN = 4096, 768, 65_536, 128  # the paper's batch, width and tokens of a forward pass
# Milliseconds of a step on an H200 (RESULTS.md), for the 15 SAEs of the paper's sweep.
PAPER_STEPS = [2.56] * 3 + [1.44, 1.41, 1.92, 1.34, 1.45, 1.81] + [1.21, 1.32, 1.88, 1.11, 1.30, 1.95]


def measure(repeats: int = 7) -> dict:
    """Median milliseconds of what the ranks exchange. Called on every rank."""
    tokens, rows = torch.zeros(FORWARD // SEQ_LEN, SEQ_LEN, dtype=torch.int64), torch.zeros(FORWARD, D)
    exchanges = {
        "flags of a step": lambda: distributed.any_rank(False, False, True),
        "tokens of a round": lambda: distributed.from_first(lambda: [({}, tokens)] * distributed.size()),
        "activations of a forward pass": lambda: distributed.broadcast(rows, 0),
        "metrics of 15 SAEs": lambda: distributed.gather_lists([dict.fromkeys("abcdefgh", 0.5)] * 15),
    }
    found = {}
    for name, exchange in exchanges.items():
        times = []
        for _ in range(repeats + 1):
            distributed.gather(None)  # all ranks begin together
            started = time.perf_counter()
            exchange()
            times.append(1000 * (time.perf_counter() - started))
        found[name] = statistics.median(times[1:])
    return found


def measured_table(sizes: list[int]) -> None:
    print(f"{machine()}, gloo, medians in ms")
    results = {}
    for size in sizes:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        done = subprocess.run([*launcher, __file__, "--worker"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results[size] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for size, found in results.items():
        received = B * D * 4 * (size - 1) / size / 2**20
        rows.append([size, *(f"{ms:.3g}" for ms in found.values()), f"{received:.1f}"])
    print(markdown_table(["ranks", *results[sizes[0]], "received per rank and step, MiB"], *rows))


def batch_ms(steps: list[float], ranks: int, harvest: float, bandwidth: float, sync: float) -> tuple[float, float]:
    """Milliseconds of a batch with so many ranks, and of these the exchange of activations."""
    work = [0.0] * ranks
    for step in sorted(steps, reverse=True):  # as plan.assign
        work[work.index(min(work))] += step
    exchange = B * D * 4 * (ranks - 1) / ranks / (bandwidth * 1e9) * 1000
    return max(work) + harvest / ranks + exchange + (sync if ranks > 1 else 0), exchange


def computed_table(args) -> None:
    sweeps = {"the paper's 15 SAEs": PAPER_STEPS, "200 SAEs of 12288 features": [1.45] * 200}
    rows, speedups = [], {}
    for name, steps in sweeps.items():
        alone, _ = batch_ms(steps, 1, args.harvest_ms, args.bandwidth, args.sync_ms)
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            ms, exchange = batch_ms(steps, ranks, args.harvest_ms, args.bandwidth, args.sync_ms)
            speedups.setdefault(name, []).append((ranks, alone / ms))
            if ranks in (1, 8, 64):
                hours = ms * 1e9 / B / 3.6e6
                rows.append([ranks, name, f"{ms:.2f}", f"{exchange:.2f}", f"{alone / ms:.1f}", f"{hours:.2f}"])
    head = ["GPUs", "sweep", "ms a batch", "exchange in it", "speed-up", "hours for 1e9 tokens"]
    print(f"Computed, not measured:\n{markdown_table(head, *rows)}")
    if args.plot:
        draw(speedups, args)


def draw(speedups: dict, args) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
    for name, points in speedups.items():
        axes.plot(*zip(*points), "o-", label=name)
    axes.plot([1, 64], [1, 64], ":", color="gray", label="ideal")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="speed-up over one GPU")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axis.set_minor_locator(plt.NullLocator())
    axes.set_title(f"computed: harvest {args.harvest_ms} ms, {args.bandwidth:g} GB/s", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(args.plot, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--computed", action="store_true", help="compute a table for GPUs")
    parser.add_argument("--harvest-ms", type=float, default=4.05, help="the language model, per batch, on one GPU")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="GB/s that a rank receives")
    parser.add_argument("--sync-ms", type=float, default=0.3, help="the exchange of flags after a step")
    parser.add_argument("--plot", type=Path, help="where to draw the computed speed-ups")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with distributed.process_group():
            found = measure()
            if distributed.rank() == 0:
                print(json.dumps(found))
    elif args.computed:
        computed_table(args)
    else:
        measured_table(args.ranks)


if __name__ == "__main__":
    main()
