"""What a group of SAEs takes on this machine, told before it is trained: memory, time, and whether it has to be split.

Memory is reckoned from shapes, time from a few steps that are taken and thrown away.
"""

import math
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from config import num_steps
from console import InputError, gib, tell
from evaluation import eval_batches, heldout_activations, kept, predict, prediction_losses
from sae import SAE_CLASSES
from sparse_ops import screen_dtype
from training import make_optimizer, training_step

LONGEST_DAYS = 30  # a group that takes longer on this machine is not started
TOO_SMALL = "this machine is too small for the sweep"
WAY_OUT = "`python main.py demo` runs in minutes, and num_tokens=… makes a smaller one (--force starts it anyway)"


def plan_group(group: list[dict], model, steps_done: int, force: bool) -> list[list[dict]]:
    """Tell what a group of completed configs takes; returns it, or the groups that fit this machine's memory.

    Raises InputError, unless `force`, if one SAE alone needs more memory than there is, or if the least arithmetic that
    will do takes more than LONGEST_DAYS after `steps_done`: that needs a second to find out.
    """
    cfg, features = group[0], sum(cfg["dict_size"] for cfg in group)
    needed, present = memory_needed(group, model), free_memory(cfg["device"])
    tell(
        f"{len(group)} SAEs on {cfg['model_name']}, {cfg['hook_point']}, {cfg['num_tokens']:,} tokens of "
        f"{cfg['dataset_path']}\non {cfg['device']}: {2 * cfg['act_size'] * features / 1e6:,.1f} million parameters, "
        f"about {gib(needed)} of memory ({gib(present)} are free)"
    )
    # The encoder's product for each SAE, all else being sparse.
    flop = (num_steps(cfg) - steps_done) * cfg["batch_size"] * 2 * cfg["act_size"] * features
    days = flop / matmul_flops(cfg["device"]) / 86400
    if days > LONGEST_DAYS and not force:
        raise InputError(f"{TOO_SMALL}: it would take more than {days:,.0f} days. {WAY_OUT}")
    if needed <= present:
        return [group]
    parts = split(group, model, present)
    for part in parts:
        if (needed := memory_needed(part, model)) > present and not force:
            raise InputError(
                f"{TOO_SMALL}: {part[0]['name']} alone needs about {gib(needed)} of memory, and {gib(present)} are "
                f"free. {WAY_OUT}"
            )
    if len(parts) > 1:
        sizes = " + ".join(str(len(part)) for part in parts)
        tell(f"That is too much memory at once: {sizes} SAEs are trained one group after the other, on the same tokens")
    return parts


def split(group: list[dict], model, present: int) -> list[list[dict]]:
    """Groups that need at most `present` bytes each, the largest SAEs first; one that needs more is alone."""
    parts = []
    for cfg in sorted(group, key=lambda cfg: -cfg["dict_size"]):
        fits = (part for part in parts if memory_needed([*part, cfg], model) <= present)
        if part := next(fits, None):
            part.append(cfg)
        else:
            parts.append([cfg])
    return parts


def memory_needed(group: list[dict], model) -> int:
    """Bytes at the peak of training the group, beyond the language model's weights."""
    cfg, size = group[0], max(getattr(torch, cfg["dtype"]).itemsize for cfg in group)
    d, B, F = cfg["act_size"], cfg["batch_size"], max(cfg["dict_size"] for cfg in group)
    # Held all the time: libraries' and allocator's part; W_enc and W_dec with Adam's two moments; the buffer; what the
    # screen of a step is written to.
    held = 2**27 + sum(getattr(torch, cfg["dtype"]).itemsize * 6 * d * cfg["dict_size"] for cfg in group)
    forward = cfg["model_batch_size"] * cfg["seq_len"]  # tokens of a forward of the language model
    buffer = min(cfg["num_batches_in_buffer"] * forward, max(cfg["num_tokens"], B))
    held += getattr(torch, cfg["activation_dtype"]).itemsize * d * buffer
    held += screen_dtype(torch.device(cfg["device"])).itemsize * F * (B + d)
    # And the largest of what comes and goes.
    step = size * (2 * d * F + 6 * B * F)  # an SAE's gradients; its activations, dense as at the start of JumpReLU's
    harvest = 4 * forward * (5 * model.cfg.d_mlp + 4 * d)
    evaluation = 4 * 3 * max(B, cfg["seq_len"]) * model.cfg.d_vocab + size * B * F
    checkpoint = size * 2 * 6 * d * F  # one SAE and its moments, as bytes, twice
    # And a tenth: the allocator keeps some of what was freed.
    return round(1.1 * (held + max(step, harvest, evaluation, checkpoint)))


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *left_in_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def left_in_cgroups(groups: Path, root: Path) -> list[float]:
    """Bytes left in each of a process's control groups that has a limit: a container, a batch job. It is killed there
    whatever the machine has free. `groups` lists them, `root` has their folders (cgroups of version 1 and 2).
    """
    left = [math.inf]
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        top, *names, cache = root, "memory.max", "memory.current", "file"
        if "memory" in controllers.split(","):
            top, *names, cache = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):  # no such group here (other controllers), or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(limit - used + int(statistics[cache]))  # the cache is given back when needed
    return left


def matmul_flops(device: str) -> float:
    """Operations per second of a matrix product in the fastest precision that is used, measured within a second."""
    a = torch.rand(2048, 2048, device=device, dtype=screen_dtype(torch.device(device)))
    a @ a  # warms up
    return 5 * 2 * 2048**3 / seconds(lambda: [a @ a for _ in range(5)], device)


def tell_time(group: list[dict], store, steps_done: int, force: bool) -> None:
    """Tell how long training and evaluation take, by a few steps of throw-away SAEs on held-out activations.

    Leaves the store as it was. Raises InputError, unless `force`, if it is more than LONGEST_DAYS.
    """
    cfg, device = group[0], group[0]["device"]
    tokens = eval_batches(store)[0]
    heldout_activations(store, tokens)  # warms up
    x = heldout_activations(store, tokens).flatten(0, 1)
    x = x.repeat(-(-cfg["batch_size"] // len(x)), 1)[: cfg["batch_size"]]
    per_token = seconds(lambda: store.get_activations(tokens), device) / tokens.numel()
    harvest = per_token * cfg["batch_size"]
    acts, keep = store.get_activations(tokens), kept(store, tokens)
    predict(store, tokens, acts)
    forward = seconds(lambda: prediction_losses(predict(store, tokens, acts), tokens, keep), device)
    step = evaluation = 0.0
    for run_cfg in group:
        its_step, its_reconstruction = times_of(run_cfg, x)
        step += its_step
        evaluation += (forward + its_reconstruction) * (2 if run_cfg["sae_type"] == "batchtopk" else 1)
    steps = num_steps(cfg) - steps_done
    batches = len(eval_batches(store))
    periodic = max((num_steps(cfg) - 1) // cfg["perf_log_freq"] - steps_done // cfg["perf_log_freq"], 0)
    training = steps * (step + harvest)
    evaluating = (batches + periodic) * (evaluation + harvest + forward) + batches * (3 * forward + 2 * harvest)
    tell(
        f"It takes about {duration(training + evaluating)} if all steps are like the first: {duration(training)} for "
        f"{steps:,} steps of {step + harvest:.2g} s (the language model's part: {harvest:.2g} s), "
        f"{duration(evaluating)} for evaluation"
    )
    days = (training + evaluating) / 86400
    if days > LONGEST_DAYS and not force:
        raise InputError(f"{TOO_SMALL}: it would take {days:,.0f} days. {WAY_OUT}")


def times_of(cfg: dict, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a training step and of a reconstruction of x [batch_size, d] by a new SAE."""
    sae = SAE_CLASSES[cfg["sae_type"]](cfg)
    optimizer = make_optimizer(sae, cfg)
    try:
        for _ in range(3):  # two to warm up
            step = seconds(lambda: training_step(sae, optimizer, x, cfg), cfg["device"])
    except FloatingPointError:
        return 0.0, 0.0  # training will say so
    with torch.no_grad():
        return step, seconds(lambda: sae.reconstruct(x), cfg["device"])


def seconds(function, device: str) -> float:
    """What a call takes, the device's work included."""
    torch.zeros(1, device=device).item()  # waits for the device
    begun = time.perf_counter()
    function()
    torch.zeros(1, device=device).item()
    return time.perf_counter() - begun


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"
