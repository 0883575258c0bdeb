"""Profile of a training step on a GPU: time per kernel, and synchronizations of the host.

    python benchmarks/profile_step.py [--sae-type batchtopk] [--top-k 32] [--dict-size 12288]

Uses the SAE and the batch of step.py.
"""

import argparse

import torch
from step import PAPER, Bench, label
from torch.profiler import ProfilerActivity, profile

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sae-type", default="batchtopk")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--dict-size", type=int, default=12288)
    args = parser.parse_args()
    setup = PAPER | dict(sae_type=args.sae_type, top_k=args.top_k, dict_size=args.dict_size)
    setup["l0"] = args.top_k if args.sae_type in ("jumprelu", "vanilla") else None
    bench = Bench(setup, ["ours"], "cuda")
    bench.hold_dead("ours")  # no dead features
    x = bench.batches[0]
    for _ in range(20):
        bench.step["ours"](x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            bench.step["ours"](x)
        torch.cuda.synchronize()
    events = profiled.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total, count = sum(e.self_device_time_total for e in kernels), sum(e.count for e in kernels)
    waits = sum(e.count for e in events if "Synchronize" in e.key)
    print(f"{torch.cuda.get_device_name()}, {label(setup)}")
    milliseconds = total / 1e3 / STEPS
    print(f"per step: {milliseconds:.3f} ms on the device, {count / STEPS:.0f} kernels, {waits / STEPS:.1f} syncs")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:30]:
        print(f"{event.self_device_time_total / 1e3 / STEPS:8.4f} ms  x{event.count / STEPS:<5.1f} {event.key[:90]}")


if __name__ == "__main__":
    main()
