"""Estimates of memory and time for a group of SAEs, printed before training; splits groups that exceed the memory.

Memory is estimated from shapes, time from a few steps whose results are discarded.
"""

import math
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from config import num_steps
from console import InputError, gib, tell
from evaluation import eval_batches, heldout_activations, kept, predict, prediction_losses, variants_of
from sae import SAE_CLASSES
from sparse_ops import screen_dtype
from training import Run, group_step, make_optimizer

MAX_DAYS = 30  # a group that would take longer on this machine is not started


def plan_group(group: list[dict], model, steps_done: int, force: bool) -> list[list[dict]]:
    """Print the memory estimate of a group of completed configs. Returns the group, or groups that fit into the memory.

    Raises InputError, unless `force`, if a single SAE needs more memory than is free, or if the encoder products of the
    steps after `steps_done` alone take more than MAX_DAYS.
    """
    cfg, features = group[0], sum(cfg["dict_size"] for cfg in group)
    needed, available = memory_needed(group, model), free_memory(cfg["device"])
    tell(
        f"{len(group)} SAEs on {cfg['model_name']}, {cfg['hook_point']}, {cfg['num_tokens']:,} tokens of "
        f"{cfg['dataset_path']}\non {cfg['device']}: {2 * cfg['act_size'] * features / 1e6:,.1f} million parameters, "
        f"about {gib(needed)} of memory ({gib(available)} are free)"
    )
    # Only the encoder products: the rest is sparse.
    flop = (num_steps(cfg) - steps_done) * cfg["batch_size"] * 2 * cfg["act_size"] * features
    days = flop / matmul_flops(cfg["device"]) / 86400
    if days > MAX_DAYS and not force:
        raise too_small(f"it would take more than {days:,.0f} days")
    if needed <= available:
        return [group]
    parts = split(group, model, available)
    for part in parts:
        if (needed := memory_needed(part, model)) > available and not force:
            name = part[0]["name"]
            raise too_small(f"{name} alone needs about {gib(needed)} of memory, and {gib(available)} are free")
    if len(parts) > 1:
        sizes = " + ".join(str(len(part)) for part in parts)
        tell(f"The memory is too small for all at once: training {sizes} SAEs in separate groups, on the same tokens")
    return parts


def too_small(reason: str) -> InputError:
    return InputError(
        f"this machine is too small for the sweep: {reason}. `python main.py demo` runs in minutes, num_tokens=… makes "
        f"a sweep shorter, --force starts it anyway"
    )


def split(group: list[dict], model, available: int) -> list[list[dict]]:
    """Groups that need at most `available` bytes each, largest SAEs first. An SAE that needs more is a group alone."""
    parts = []
    for cfg in sorted(group, key=lambda cfg: -cfg["dict_size"]):
        fits = (part for part in parts if memory_needed([*part, cfg], model) <= available)
        if part := next(fits, None):
            part.append(cfg)
        else:
            parts.append([cfg])
    return parts


def memory_needed(group: list[dict], model) -> int:
    """Peak memory of training the group in bytes, without the language model's weights."""
    cfg, size = group[0], max(getattr(torch, cfg["dtype"]).itemsize for cfg in group)
    d, B, F = cfg["act_size"], cfg["batch_size"], max(cfg["dict_size"] for cfg in group)
    # Held permanently: libraries and allocator; W_enc and W_dec with Adam's two moments; the activation buffer; the
    # output of a step's screen.
    held = 2**27 + sum(getattr(torch, cfg["dtype"]).itemsize * 6 * d * cfg["dict_size"] for cfg in group)
    forward = cfg["model_batch_size"] * cfg["seq_len"]  # tokens of a forward of the language model
    buffer = min(cfg["num_batches_in_buffer"] * forward, max(cfg["num_tokens"], B))
    held += getattr(torch, cfg["activation_dtype"]).itemsize * d * buffer
    held += screen_dtype(torch.device(cfg["device"])).itemsize * F * (B + d)
    # The largest temporary allocation.
    step = size * (2 * d * F + 6 * B * F)  # gradients and activations of an SAE, which are dense at first in JumpReLU
    harvest = 4 * forward * (5 * model.cfg.d_mlp + 4 * d)
    evaluation = 4 * 3 * max(B, cfg["seq_len"]) * model.cfg.d_vocab + size * B * F
    checkpoint = size * 2 * 6 * d * F  # one SAE and its moments, as bytes, twice
    # 10 % more, because the allocator keeps some freed memory.
    return round(1.1 * (held + max(step, harvest, evaluation, checkpoint)))


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    cgroups = memory_left_in_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min(psutil.virtual_memory().available, *cgroups)


def memory_left_in_cgroups(groups: Path, root: Path) -> list[float]:
    """Bytes left in each control group of the process that has a limit (container, batch job). Exceeding one kills the
    process even if the machine has free memory. `groups` lists the groups, `root` has their folders (cgroups v1, v2).
    """
    left = [math.inf]
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        top, *names, cache = root, "memory.max", "memory.current", "file"
        if "memory" in controllers.split(","):
            top, *names, cache = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):  # no such group, or the limit is "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(limit - used + int(statistics[cache]))  # the cache can be reclaimed
    return left


def matmul_flops(device: str) -> float:
    """Measured FLOP/s of matrix products in the fastest precision in use. Takes about a second."""
    a = torch.rand(2048, 2048, device=device, dtype=screen_dtype(torch.device(device)))
    a @ a  # warm-up
    return 5 * 2 * 2048**3 / time_call(lambda: [a @ a for _ in range(5)], device)


def estimate_time(group: list[dict], store, steps_done: int, force: bool) -> None:
    """Print how long training and evaluation will take, estimated from a few steps of new SAEs on held-out activations.

    Does not change the store. Raises InputError, unless `force`, if the estimate exceeds MAX_DAYS.
    """
    cfg, device = group[0], group[0]["device"]
    tokens = eval_batches(store)[0]
    heldout_activations(store, tokens)  # warm-up
    x = heldout_activations(store, tokens).flatten(0, 1)
    x = x.repeat(-(-cfg["batch_size"] // len(x)), 1)[: cfg["batch_size"]]
    per_token = time_call(lambda: store.get_activations(tokens), device) / tokens.numel()
    harvest = per_token * cfg["batch_size"]
    acts, keep = store.get_activations(tokens), kept(store, tokens)
    predict(store, tokens, acts)
    forward = time_call(lambda: prediction_losses(predict(store, tokens, acts), tokens, keep), device)
    step = evaluation = final = 0.0
    for run_cfg in group:
        sae_step, reconstruction = step_times(run_cfg, x)
        step += sae_step
        evaluation += (forward + reconstruction) * len(variants_of(run_cfg, whole=False))
        final += (forward + reconstruction) * len(variants_of(run_cfg, whole=True))
    steps = num_steps(cfg) - steps_done
    batches = len(eval_batches(store))
    periodic = max((num_steps(cfg) - 1) // cfg["perf_log_freq"] - steps_done // cfg["perf_log_freq"], 0)
    training = steps * (step + harvest)
    evaluating = periodic * (evaluation + harvest + forward) + batches * (final + 4 * forward + 3 * harvest)
    tell(
        f"Estimated time: {duration(training + evaluating)} if all steps are like the first: {duration(training)} for "
        f"{steps:,} steps of {step + harvest:.2g} s ({harvest:.2g} s of it in the language model), "
        f"{duration(evaluating)} for evaluation"
    )
    days = (training + evaluating) / 86400
    if days > MAX_DAYS and not force:
        raise too_small(f"it would take {days:,.0f} days")


def step_times(cfg: dict, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a training step and of a reconstruction of x [batch_size, d], for a new SAE."""
    sae, outputs = SAE_CLASSES[cfg["sae_type"]](cfg), []
    run = Run(cfg, sae, make_optimizer(sae, cfg), log=None)
    warm_up = 5 if sae.W_enc.is_cuda else 2  # on CUDA the first steps record CUDA graphs
    seconds = [time_call(lambda: group_step([run], x, outputs, {}), cfg["device"]) for _ in range(warm_up + 2)]
    if any(isinstance(output, FloatingPointError) for output in outputs):
        return 0.0, 0.0  # training will report it
    with torch.no_grad():
        return min(seconds[warm_up:]), time_call(lambda: sae.reconstruct(x), cfg["device"])


def time_call(function, device: str) -> float:
    """Seconds of a call, including the device's work."""
    torch.zeros(1, device=device).item()  # waits for the device
    start = time.perf_counter()
    function()
    torch.zeros(1, device=device).item()
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"
