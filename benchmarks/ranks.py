"""Cost of training with several ranks: measured on this machine with gloo, and computed for GPUs.

    python benchmarks/ranks.py [--ranks 1 2 4] [--plot FILE]
    python benchmarks/ranks.py --computed [--harvest-ms 4.05] [--bandwidth 20] [--sync-ms 0.3] [--plot FILE]
    python benchmarks/ranks.py --shards [--ranks 1 2 4]
    python benchmarks/ranks.py --million-here
    python benchmarks/ranks.py --million [--bandwidth 200]

The first measures what the ranks exchange, for batches of the paper's size, between processes on this machine. The
second computes the time of a batch for 1 to 64 GPUs. The steps of the SAEs and the harvest of a batch were measured on
one H200 (RESULTS.md). Assumptions: the bandwidth in GB/s at which a rank receives activations, the time to exchange
the flags after a step, and that activations are received during training without slowing it.

The third measures a step of one SAE with so many feature_shards, and its exchanges. The fourth trains 2^20 features of
width 256 for a few steps in 4 processes, and compares their memory with the plan's estimate. The last computes memory
and time for 2^20 features of width 4096 on GPUs, from assumed speeds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from common import machine, markdown_table

import distributed
import plan
import shards
from config import get_default_cfg, post_init_cfg
from sae import BatchTopKSAE
from training_step import make_optimizer, training_step

B, D, FORWARD, SEQ_LEN = 4096, 768, 65_536, 128  # the paper's batch, width and tokens of a forward pass
# Milliseconds of a step on an H200 at commit 2fafd45 (RESULTS.md), for the 15 SAEs of the paper's sweep.
PAPER_STEPS = [2.56] * 3 + [1.44, 1.41, 1.92, 1.34, 1.45, 1.81] + [1.21, 1.32, 1.88, 1.11, 1.30, 1.95]


def measure(repeats: int = 7) -> dict:
    """Median milliseconds of what the ranks exchange. Called on every rank."""
    tokens, rows = torch.zeros(FORWARD // SEQ_LEN, SEQ_LEN, dtype=torch.int64), torch.zeros(FORWARD, D)
    exchanges = {
        "flags of a step": lambda: distributed.any_rank(False, False, True),
        "tokens of a round": lambda: distributed.from_rank_0(lambda: [({}, tokens)] * distributed.size()),
        "activations of a forward pass": lambda: distributed.start_broadcast(rows, 0)(),
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


def measure_shards(steps: int = 5) -> dict:
    """Median milliseconds of a BatchTopK step and of its exchanges, by dictionary size; bytes received per step."""
    team, found, seconds = shards.team(distributed.size()), {}, {}

    def timed(name, function):
        def call(self, *args):
            started = time.perf_counter()
            result = function(self, *args)
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
            return result

        return call

    received = 0
    real_gather, real_swap = shards.dist.all_gather, shards.dist.all_to_all_single

    def gather(found, tensor, **options):
        nonlocal received
        received += tensor.nbytes * (team.count - 1)
        return real_gather(found, tensor, **options)

    def swap(to, tensor, **options):
        nonlocal received
        received += tensor.nbytes * (team.count - 1) // team.count
        return real_swap(to, tensor, **options)

    shards.dist.all_gather, shards.dist.all_to_all_single = gather, swap
    shards.Shards.largest = timed("selection", shards.Shards.largest)
    shards.Shards.add = timed("sum of reconstructions", shards.Shards.add)
    for dict_size in (16_384, 65_536):
        cfg = get_default_cfg() | dict(act_size=256, dict_size=dict_size, batch_size=1024, device="cpu")
        cfg = post_init_cfg(cfg | {"feature_shards": team.count})
        sae = BatchTopKSAE(cfg, team)
        optimizer, x, times = make_optimizer(sae, cfg), torch.randn(1024, 256), []
        for _ in range(steps + 1):
            seconds.clear()
            received = 0
            started = time.perf_counter()
            training_step(sae, optimizer, x, cfg)
            times.append({"step": time.perf_counter() - started} | seconds)
        found[dict_size] = {key: 1000 * statistics.median(t[key] for t in times[1:]) for key in times[0]}
        found[dict_size]["received, MiB"] = received / 2**20
    return found


def measure_million() -> dict:
    """Loss in each step, milliseconds of the last, and memory in GiB of 2^20 features of width 256 on the ranks."""
    cfg = get_default_cfg() | dict(act_size=256, dict_size=2**20, batch_size=512, device="cpu", top_k=16)
    cfg |= dict(model_batch_size=4, num_batches_in_buffer=1, feature_shards=distributed.size())
    cfg = post_init_cfg(cfg)
    no_model = SimpleNamespace(cfg=SimpleNamespace(d_mlp=0, d_vocab=0))
    estimate = plan.memory_needed([cfg], no_model)
    sae = BatchTopKSAE(cfg, shards.team(distributed.size()))
    optimizer, losses = make_optimizer(sae, cfg), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(512, 256, generator=generator)
        started = time.perf_counter()
        losses.append(training_step(sae, optimizer, x, cfg)["loss"].item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "losses": losses, "ms of a step": round(1000 * (time.perf_counter() - started)),
        "GiB estimated for a rank": round(estimate / 2**30, 2),
        "GiB at most, by rank": [round(each / 2**30, 2) for each in distributed.gather(peak)],
    }  # fmt: skip


def million_table(counts: list[int], bandwidth: float) -> None:
    """Computed memory and time of a step with 2^20 features, d 4096, B 4096, k 32."""
    flops, memory_speed, latency = 500e12, 3e12, 50e-6
    F, d, B = 2**20, 4096, 4096
    speeds = f"{flops / 1e12:.0f} TFLOP/s in the screen, {memory_speed / 1e12:.0f} TB/s of memory"
    print(f"Computed, not measured: {speeds}, {bandwidth:g} GB/s between GPUs, {latency * 1e6:.0f} µs per exchange")
    rows = []
    for count in counts:
        own = F // count
        weights, gradients, screened = 24 * own * d, 8 * own * d, 2 * own * (B + d)
        screen = 2 * B * own * d / flops
        # Adam reads and writes the weights, its moments and the gradients; then the rows and the screen's operand.
        update = (28 * 2 + 8 + 8 + 6) * own * d / memory_speed + 3 * 2 * B * own / memory_speed
        received = 2 * (count - 1) / count * (4 * B * d + 3 * 8 * 2**11 + 4 * d)
        exchange = received / (bandwidth * 1e9) + 20 * latency
        gib = [f"{size / 2**30:.1f}" for size in (weights, gradients, screened)]
        seconds = screen + update + exchange, screen, exchange
        rows.append([count, *gib, *(f"{1000 * each:.1f}" for each in seconds)])
    head = ["GPUs", "GiB per GPU: weights and Adam", "gradients", "screen", "ms a step", "of it screen", "exchange"]
    print(markdown_table([head, *rows]))


def run_workers(size: int, option: str) -> dict:
    """What this script prints with an option as its last line, as one of `size` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    done = subprocess.run([*launcher, __file__, "--worker", option], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def shards_table(sizes: list[int]) -> None:
    print(f"{machine()}, gloo, medians in ms, B 1024, d 256, k 32")
    rows = []
    for size in sizes:
        for dict_size, found in run_workers(size, "--shards").items():
            ms = (f"{found.get(key, 0):.3g}" for key in ("step", "selection", "sum of reconstructions"))
            rows.append([dict_size, size, *ms, f"{found['received, MiB']:.2f}"])
    head = ["F", "shards", "step", "selection", "sum of reconstructions", "received per rank and step, MiB"]
    print(markdown_table([head, *rows]))


def measured_table(sizes: list[int]) -> None:
    print(f"{machine()}, gloo, medians in ms")
    results = {size: run_workers(size, "--ranks=1") for size in sizes}
    rows = []
    for size, found in results.items():
        received = B * D * 4 * (size - 1) / size / 2**20
        rows.append([size, *(f"{ms:.3g}" for ms in found.values()), f"{received:.1f}"])
    print(markdown_table([["ranks", *results[sizes[0]], "received per rank and step, MiB"], *rows]))


def batch_ms(steps: list[float], ranks: int, harvest: float, bandwidth: float, sync: float) -> tuple[float, float]:
    """Milliseconds of a batch with so many ranks, and of the exchange of activations, which overlaps it."""
    work = [0.0] * ranks
    for step in sorted(steps, reverse=True):  # as plan.assign
        work[work.index(min(work))] += step
    exchange = B * D * 4 * (ranks - 1) / ranks / (bandwidth * 1e9) * 1000
    return max(max(work) + harvest / ranks, exchange) + (sync if ranks > 1 else 0), exchange


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
    head = ["GPUs", "sweep", "ms a batch", "exchange, ms", "speed-up", "hours for 1e9 tokens"]
    print(f"Computed, not measured:\n{markdown_table([head, *rows])}")
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
    parser.add_argument("--shards", action="store_true", help="measure an SAE split over the ranks")
    parser.add_argument("--million-here", action="store_true", help="train 2^20 features in 4 processes")
    parser.add_argument("--million", action="store_true", help="compute a table for 2^20 features")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with distributed.process_group():
            found = measure_million() if args.million_here else measure_shards() if args.shards else measure()
            if distributed.rank() == 0:
                print(json.dumps(found))
    elif args.shards:
        shards_table(args.ranks)
    elif args.million_here:
        print(f"{machine()}, gloo, 4 processes: {run_workers(4, '--million-here')}")
    elif args.million:
        million_table([4, 8, 16], args.bandwidth)
    elif args.computed:
        computed_table(args)
    else:
        measured_table(args.ranks)


if __name__ == "__main__":
    main()
