"""Time and memory of one training step, compared with dense steps and with the encoder product alone.

    python benchmarks/step.py [--growth] [--rounds N] [--only TEXT] [--json FILE] [--plot FILE]

Every round times, on the same batch: our training step; our step in its dense form; the published step
(dense_reference.py), on CUDA also with TF32 products and bfloat16 autocast; for Matryoshka also BatchTopK's step; and
the encoder product [B, d] x [d, F] in float32. Times are medians over rounds with quartiles; ratios are medians of the
ratios of each round. On CUDA a time is the mean of 10 steps between two events. Peak memory is the memory of the
process (on CUDA: reserved by torch on the device) during such steps, minus that before the SAE was built, so it
includes weights, optimizer and gradients.

Tokens are sparse sums of random directions plus noise. Dead features are kept dead: before every step their encoder
columns are scaled down and their counters set high. Initial thresholds or biases set the L0 of JumpReLU and vanilla.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path

import psutil
import torch
from common import machine, markdown_table, quartiles
from dense_reference import DenseReference
from tqdm import tqdm

from config import post_init_cfg
from sae import SAE_CLASSES
from sparse_ops import screen_dtype
from training_step import Run, group_step, make_optimizer

CONTENDERS = (
    "ours", "dense form", "batchtopk", "published", "published, TF32", "published, bf16", "encoder product"
)  # fmt: skip
ON_CUDA = ("published, TF32", "published, bf16")
STEPS_AT_ONCE = 10  # on CUDA, so that host and device overlap as in training
PAPER = dict(batch_size=4096, act_size=768, dict_size=12288, top_k=32, num_dead=0, l0=None)
SETUPS = [dict(sae_type=t, dict_size=768 * n) for t in ("batchtopk", "topk") for n in (4, 8, 16, 32)]
SETUPS += [dict(sae_type=t, top_k=k) for t in ("batchtopk", "topk") for k in (16, 64)]
SETUPS += [dict(sae_type="batchtopk", num_dead=n) for n in (500, 2000, 8000)]
SETUPS += [dict(sae_type="topk", num_dead=2000)]
SETUPS += [dict(sae_type="matryoshka"), dict(sae_type="matryoshka", num_dead=2000)]
SETUPS += [dict(sae_type="jumprelu", l0=l0) for l0 in (32, 128)]
SETUPS += [dict(sae_type="vanilla", l0=l0) for l0 in (64, 1000)]
DEMO = dict(batch_size=1024, act_size=128)
SIZES = ((256, 16), (512, 8), (512, 32), (1024, 16))
DEMOS = [dict(DEMO, sae_type="batchtopk", dict_size=size, top_k=k) for size, k in SIZES]
DEMOS += [dict(DEMO, sae_type="topk", dict_size=512, top_k=k) for k in (8, 16)]
DEMOS += [dict(DEMO, sae_type="matryoshka", dict_size=512, top_k=k) for k in (8, 32)]
DEMOS += [dict(DEMO, sae_type="jumprelu", dict_size=512, l0=16), dict(DEMO, sae_type="vanilla", dict_size=512, l0=40)]
LARGE = [dict(sae_type=t, dict_size=98304) for t in ("batchtopk", "topk")]  # on CUDA only
GROWTH = [dict(sae_type="batchtopk", dict_size=2**n) for n in range(13, 18)]
GROWTH += [dict(sae_type="batchtopk", batch_size=2**n) for n in range(10, 15)]
LARGEST = {"published": 2**27, "dense form": 2**23}  # entries of [B, F] on a CPU: larger ones are too slow


def label(setup: dict) -> str:
    more = f", k {setup['top_k']}" if setup["l0"] is None else f", L0 about {setup['l0']}"
    more += f", {setup['num_dead']} dead" if setup["num_dead"] else ""
    return f"{setup['sae_type']}, B {setup['batch_size']}, d {setup['act_size']}, F {setup['dict_size']}{more}"


def batches(setup: dict, device: str) -> list[torch.Tensor]:
    """Two batches [B, d]. Each token is a sum of 40 out of 4 d directions with exponential weights, plus noise."""
    generator = torch.Generator().manual_seed(0)
    B, d = setup["batch_size"], setup["act_size"]
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=generator), dim=-1)
    result = []
    for _ in range(2):
        which = torch.randint(4 * d, (B, 40), generator=generator)
        weights = torch.empty(B, 40).exponential_(generator=generator)
        x = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=weights, mode="sum")
        result.append((x + 0.05 * torch.randn(B, d, generator=generator)).to(device))
    return result


class Bench:
    """The contenders of one setup, each with separate weights and optimizer; `step[name](x)` runs one step."""

    def __init__(self, setup: dict, names: list[str], device: str):
        keys = {key: value for key, value in setup.items() if key not in ("num_dead", "l0")}
        l1_coeff = 0.0 if setup["l0"] is None else 0.001
        cfg = post_init_cfg(keys | {"device": device, "l1_coeff": l1_coeff})
        self.setup, self.cfg, self.batches, self.saes = setup, cfg, batches(setup, device), {}
        self.step = {}
        for name in names:
            sae = self.build("batchtopk" if name == "batchtopk" else cfg["sae_type"])
            if name.startswith("published"):
                sae = DenseReference(sae)
                self.step[name] = partial(in_precision, name, sae.step)
            elif name == "encoder product":
                W_enc = sae.W_enc.detach().contiguous()
                self.step[name] = W_enc.__rmatmul__
            else:
                optimizer = make_optimizer(sae, cfg)
                if name == "dense form":
                    sae.select = lambda x, wait: None
                run = Run(cfg, sae, optimizer, log=None)
                self.step[name] = lambda x, run=run: group_step([run], x, [], {})
            self.saes[name] = sae

    @torch.no_grad()
    def build(self, sae_type: str):
        sae = SAE_CLASSES[sae_type](self.cfg)
        if self.setup["l0"] is not None:
            z = sae.pre_activation(sae.preprocess_input(self.batches[0][:512])[0])
            level = z.flatten().kthvalue(z.numel() - 512 * self.setup["l0"]).values
            if self.cfg["sae_type"] == "jumprelu":
                sae.jumprelu.log_threshold.fill_(level.log())
            else:
                sae.b_enc.fill_(-level)
        return sae

    @torch.no_grad()
    def hold_dead(self, name: str) -> None:
        sae, n = self.saes[name], self.setup["num_dead"]
        if name == "encoder product":
            return
        sae.num_batches_not_active[:n], sae.num_batches_not_active[n:] = 10, -1000  # the others never die
        if hasattr(sae, "counts"):
            sae.known_counts = None
            sae.known_counts = sae.counts()
        if n:
            W_enc = sae.p["W_enc"] if name.startswith("published") else sae.W_enc
            W_enc[:, :n] *= 0.2 * W_enc[:, n:].norm(dim=0).mean() / W_enc[:, :n].norm(dim=0)

    def time(self, name: str, x: torch.Tensor) -> float:
        """Seconds per step."""
        self.hold_dead(name)
        if not x.is_cuda:
            start = time.perf_counter()
            self.step[name](x)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS_AT_ONCE):
            self.step[name](x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / STEPS_AT_ONCE


def in_precision(name: str, step, x: torch.Tensor):
    """Run a published step in the precision given by its name."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = "TF32" in name
    try:
        with torch.autocast(x.device.type, torch.bfloat16, enabled="bf16" in name):
            return step(x)
    finally:
        matmul.allow_tf32 = False


def measure(setup: dict, rounds: int, device: str, memory: bool) -> dict:
    size = setup["batch_size"] * setup["dict_size"]
    names = [name for name in CONTENDERS if name != "batchtopk" or setup["sae_type"] == "matryoshka"]
    if not device.startswith("cuda"):
        names = [name for name in names if name not in ON_CUDA and size <= LARGEST.get(name, size)]
    bench = Bench(setup, names, device)
    for i in range(12 if setup["l0"] is not None else 4):  # the form follows L0, which changes at first
        bench.time("ours", bench.batches[i % 2])
    seconds = {name: [] for name in names}
    for i in range(rounds + 1):  # the first is a warm-up
        for name in names:
            took = bench.time(name, bench.batches[i % 2])
            if i > 0:
                seconds[name].append(took)
    del bench
    names = [name for name in ("ours", "published") if name in names and memory]
    peak_of = peak_memory if device.startswith("cuda") else in_own_process
    peak = {name: peak_of(setup, name, device) for name in names}
    return {"setup": setup, "seconds": seconds, "peak_bytes": peak}


def in_own_process(setup: dict, name: str, device: str) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (setup, name, device))


def peak_memory(setup: dict, name: str, device: str) -> int:
    """Peak memory of two steps in bytes, minus the memory of the process (or device) before the SAE was built."""
    batches(setup, device)
    cuda = device.startswith("cuda")
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved() if cuda else psutil.Process().memory_info().rss
    bench = Bench(setup, [name], device)
    for i in range(2 if setup["l0"] is None else 12):
        if not cuda and i == (0 if setup["l0"] is None else 10):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        bench.time(name, bench.batches[i % 2])
    if cuda:
        return torch.cuda.max_memory_reserved() - before
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def table(results: list[dict]) -> str:
    others = [name for name in CONTENDERS[1:-1] if any(name in result["seconds"] for result in results)]
    heads = ["SAE", "ours, ms (quartiles)", "tokens/s", *(f"{name} ÷ ours" for name in others)]
    rows = [[*heads, "ours ÷ encoder product", "peak MiB: ours, published"]]
    for result in results:
        seconds, peak = result["seconds"], result["peak_bytes"]
        cells = [label(result["setup"]), quartiles([s * 1e3 for s in seconds["ours"]], ",.3g")]
        cells += [f"{result['setup']['batch_size'] / statistics.median(seconds['ours']):,.0f}"]
        cells += [f"{ratio(seconds, name, 'ours'):.1f}" if name in seconds else "" for name in others]
        cells += [f"{ratio(seconds, 'ours', 'encoder product'):.2f}"]
        rows.append([*cells, ", ".join(f"{size / 2**20:,.0f}" for size in peak.values())])
    return markdown_table(rows)


def ratio(seconds: dict, a: str, b: str) -> float:
    """The median over rounds of the ratio a / b."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))


def plot(results: list[dict], file: Path) -> None:
    """Plot seconds per step against dictionary size and batch size, on logarithmic axes."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, 2, figsize=(6.8, 2.8), sharey=True, layout="constrained")
    styles = {"published": ("#999999", "s"), "encoder product": ("#E69F00", "^"), "ours": ("#0072B2", "o")}
    for ax, key, axis_label in ((axes[0], "dict_size", "dictionary size"), (axes[1], "batch_size", "batch size")):
        other = "batch_size" if key == "dict_size" else "dict_size"
        rows = [row for row in results if row["setup"][other] == PAPER[other]]
        if key == "dict_size":  # PAPER's size is not a power of 2 and its label would overlap
            rows = [row for row in rows if row["setup"][key] != PAPER[key]]
        for contender, (colour, marker) in styles.items():
            timed = [row for row in rows if contender in row["seconds"]]
            points = sorted((row["setup"][key], statistics.median(row["seconds"][contender])) for row in timed)
            name = f"{contender}, step" if contender != "encoder product" else "encoder product alone, float32"
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=4, label=name)
        ax.set(xscale="log", yscale="log", xlabel=f"{axis_label} ({other.replace('_', ' ')} {PAPER[other]})")
        ax.set_xticks([r["setup"][key] for r in rows], [f"{r['setup'][key]:,}" for r in rows], minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.suptitle("One training step of BatchTopK, d 768, k 32", fontsize=9)
    figure.savefig(file, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--growth", action="store_true", help="dictionaries of 2^13 to 2^17 and batches of 2^10 to 2^14"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only setups whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all times to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the results to this file (with --growth)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    if args.plot and not args.growth:
        parser.error("--plot needs --growth")
    setups = GROWTH if args.growth else SETUPS + (LARGE if args.device.startswith("cuda") else []) + DEMOS
    setups = [PAPER | setup for setup in setups]
    chosen = [setup for setup in setups if args.only in label(setup)]
    if not chosen:
        parser.error(f"--only {args.only!r} matches none of: {'; '.join(map(label, setups))}")
    results = []
    for setup in tqdm(chosen, unit="setup"):
        results.append(measure(setup, args.rounds, args.device, memory=not args.growth))
        tqdm.write(table(results[-1:]).splitlines()[-1])
    screen = torch.float16 if args.device.startswith("cuda") else screen_dtype(torch.device("cpu"))  # triton_ops.py
    print(f"\n{machine(args.device)}, screen in {screen}\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
