"""Estimates the memory and time of a group of SAEs before training, and prints them. Splits groups that need too much
memory, and assigns the SAEs of a group to the ranks of torchrun (distributed.py).

Memory is estimated from shapes; time is measured on a few steps, whose results are discarded.
"""

import math
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

import distributed
from checkpoint import run_folder
from config import num_steps
from console import InputError, count_of, gib, tell
from evaluation import eval_batches, position_mask, predict, prediction_losses, variants_of
from sae import SAE_CLASSES
from shards import team
from sparse_ops import screen_dtype
from training_step import Run, graph_key, group_step, is_small, make_optimizer

MAX_DAYS = 30  # a group that would take longer is not started
SHORTER = "num_tokens=… makes a sweep shorter"


def plan_group(group: list[dict], model, steps_done: int, force: bool, available: int) -> list[list[dict]]:
    """Print the memory estimate of a group of completed configs. Returns a list of groups that fit into `available`
    bytes per rank: the whole group if it fits, else parts of it.

    Raises InputError, unless `force`, if a single SAE needs more than `available`, or if the encoder products alone of
    the steps after `steps_done` take more than MAX_DAYS.
    """
    cfg, features, ranks = group[0], sum(cfg["dict_size"] for cfg in group), distributed.size()
    teams = ranks // cfg["feature_shards"]
    needed = memory_needed(group, model)
    where, free = (f"{ranks} × {cfg['device']}", "for each") if ranks > 1 else (cfg["device"], "free")
    tell(
        f"{count_of(len(group), 'SAE')} on {cfg['model_name']}, {cfg['hook_point']}, {cfg['num_tokens']:,} tokens of "
        f"{cfg['dataset_path']}\non {where}: {2 * cfg['act_size'] * features / 1e6:,.1f} million parameters, "
        f"about {gib(needed)} of memory ({gib(available)} are {free})\nin {run_folder(cfg).parent}"
    )
    if steps_done == 0:
        warn_of_full_disk(group)
    parts = [group] if needed <= available else split(group, model, available)
    for part in parts:
        if (needed := memory_needed(part, model)) > available and not force:
            name = part[0]["name"]
            reason = f"{name} alone needs about {gib(needed)} of memory, and {gib(available)} are free"
            reason += shards_that_fit(part[0], model, available)
            raise too_small(reason, "a smaller dict_size, batch_size or eval_tokens needs less")
    # Only the encoder products: the rest is sparse.
    flop = (num_steps(cfg) - steps_done) * cfg["batch_size"] * 2 * cfg["act_size"] * features
    days = flop / ranks / matmul_flops(cfg["device"]) / 86400
    if days > MAX_DAYS and not force:
        raise too_small(f"it would take more than {days:,.0f} days", SHORTER)
    groups = [sum(parts[i : i + teams], []) for i in range(0, len(parts), teams)]
    if len(groups) > 1:
        sizes = " + ".join(str(len(part)) for part in groups)
        tell(f"The memory is too small for all at once: training {sizes} SAEs in separate groups, on the same tokens")
    return groups


def warn_of_full_disk(group: list[dict]) -> None:
    """Warn if output_dir has too little space for the checkpoints, one more than are kept, and the SAEs."""
    cfg, folder = group[0], Path(group[0]["output_dir"]).absolute()
    weights = sum(2 * cfg["act_size"] * cfg["dict_size"] * getattr(torch, cfg["dtype"]).itemsize for cfg in group)
    needed = weights * (3 * (cfg["keep_checkpoints"] + 1) + 1)  # a checkpoint also has Adam's two moments
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        where = f"output_dir = {cfg['output_dir']!r}"
        tell(f"warning: {where}: checkpoints and SAEs need up to {gib(needed)} of disk space, and {gib(free)} are free")


def too_small(reason: str, remedy: str) -> InputError:
    return InputError(
        f"this machine is too small for the sweep: {reason}. `python main.py demo` runs in minutes, {remedy}, --force "
        f"starts it anyway"
    )


def shards_that_fit(cfg: dict, model, available: int) -> str:
    """A clause that proposes feature_shards for an SAE that does not fit; empty if none would help."""
    for count in (2**i for i in range(1, 11)):
        if cfg["dict_size"] % count == 0 and count > cfg["feature_shards"]:
            needed = memory_needed([cfg | {"feature_shards": count}], model)
            if needed <= available:
                return f" (with feature_shards={count} about {gib(needed)} on each of {count} GPUs or machines)"
    return ""


def split(group: list[dict], model, available: int) -> list[list[dict]]:
    """Groups that need at most `available` bytes each, largest SAEs first. A larger SAE is a group of its own."""
    parts = []
    for cfg in sorted(group, key=lambda cfg: -cfg["dict_size"]):
        fits = (part for part in parts if memory_needed([*part, cfg], model) <= available)
        if part := next(fits, None):
            part.append(cfg)
        else:
            parts.append([cfg])
    return parts


def memory_needed(group: list[dict], model) -> int:
    """Peak memory on a rank of training the group in bytes, without the language model's weights."""
    cfg, size = group[0], max(getattr(torch, cfg["dtype"]).itemsize for cfg in group)
    threads = min(torch.get_num_threads(), sum(map(is_small, group)))
    shards = cfg["feature_shards"]
    d, B, F = cfg["act_size"], cfg["batch_size"], max(cfg["dict_size"] for cfg in group) // shards
    # Held permanently: 128 MiB for libraries and allocator; W_enc and W_dec with Adam's two moments; the activation
    # buffers; the held-out activations; the operands and output of a step's screen.
    held = 2**27 + sum(getattr(torch, cfg["dtype"]).itemsize * 6 * d * cfg["dict_size"] // shards for cfg in group)
    forward = cfg["model_batch_size"] * cfg["seq_len"]  # tokens of a forward of the language model
    buffer = min(cfg["num_batches_in_buffer"] * forward, max(cfg["num_tokens"], B))
    buffers = 2 if max(distributed.size(), shards) > 1 else 1
    held += getattr(torch, cfg["activation_dtype"]).itemsize * d * buffer * buffers
    if cfg["device"].startswith("cpu"):  # the held-out activations are in main memory
        held += 4 * d * cfg["eval_tokens"]
    held += screen_dtype(torch.device(cfg["device"])).itemsize * F * (B + d)
    # The largest temporary allocation.
    # Gradients and activations of an SAE, which are dense at first in JumpReLU. Small SAEs step side by side.
    small = max((cfg["dict_size"] for cfg in group if is_small(cfg)), default=0)
    step = size * (2 * d + 6 * B) * max(F, threads * small)
    harvest = 4 * forward * (5 * model.cfg.d_mlp + 4 * d)
    evaluation = 4 * 3 * max(B, cfg["seq_len"]) * model.cfg.d_vocab + size * B * F
    checkpoint = size * 2 * 6 * d * F  # one SAE and its moments, as bytes, twice
    # 10 % more, because the allocator keeps some freed memory.
    return round(1.1 * (held + max(step, harvest, evaluation, checkpoint)))


def free_memory(device: str) -> int:
    """Bytes that each rank can use."""
    if device.startswith("cuda"):
        return min(distributed.gather(torch.cuda.mem_get_info(device)[0]))
    cgroups = memory_left_in_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    free = min(psutil.virtual_memory().available, *cgroups)
    return min(distributed.gather(free // distributed.local_size()))


def memory_left_in_cgroups(groups: Path, root: Path) -> list[float]:
    """Bytes left in each of the process's control groups that has a limit (containers, batch jobs). A process
    that exceeds its limit is killed, even if the machine has free memory. `groups` is a file that lists the groups;
    their folders are in `root` (cgroups v1 or v2).
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
    """Measured FLOP/s of matrix products in the screen's precision, the lowest in use. Takes about a second."""
    a = torch.rand(2048, 2048, device=device, dtype=screen_dtype(torch.device(device)))
    a @ a  # warm-up
    return 5 * 2 * 2048**3 / time_call(lambda: [a @ a for _ in range(5)], device)


def plan_time(group: list[dict], store, steps_done: int, force: bool, available: int) -> list[int]:
    """Measure a few steps of new SAEs on held-out activations, print how long training and evaluation will take, and
    return the number of each SAE's team, which without feature_shards is its rank.

    Does not change the store. Raises InputError, unless `force`, if the estimate exceeds MAX_DAYS. If no step is left,
    nothing is measured.
    """
    cfg, device, ranks = group[0], group[0]["device"], distributed.size()
    by_size = assign(group, [run_cfg["dict_size"] for run_cfg in group], store.model, available)
    if steps_done == num_steps(cfg):
        return by_size
    teams = ranks // cfg["feature_shards"]
    # In seconds per batch: harvest, the language model up to the hook point; forward, from there on, with the losses;
    # and for each SAE, step, step_with_dead and reconstruction (step_times).
    tokens = eval_batches(store)[0]
    acts, mask = store.get_activations(tokens), position_mask(store, tokens)  # also a warm-up
    x = acts[:, cfg["eval_skip_positions"] :].flatten(0, 1)
    x = x[torch.arange(cfg["batch_size"]) % len(x)]  # repeated or cut to a batch
    per_token = time_call(lambda: store.get_activations(tokens), device) / tokens.numel()
    contexts = tokens[torch.arange(cfg["model_batch_size"]) % len(tokens)]
    if per_token * contexts.numel() < 2:  # seconds: short enough to measure a whole forward pass as in training
        per_token = time_call(lambda: store.get_activations(contexts), device) / contexts.numel()
    harvest = per_token * cfg["batch_size"]
    predict(store, tokens, acts)  # warm-up
    forward = time_call(lambda: prediction_losses(predict(store, tokens, acts), tokens, mask), device)
    shards = team(cfg["feature_shards"])
    own = [i for i, owner in enumerate(by_size) if owner == shards.team_index]
    times = dict(distributed.gather_lists(list(zip(own, step_times([group[i] for i in own], x)))))
    step, step_with_dead, reconstruction = zip(*(times[i] for i in range(len(group))))
    harvest, forward = distributed.from_rank_0(lambda: (harvest, forward))
    owners = assign(group, step, store.model, available)
    parts = [[i for i, owner in enumerate(owners) if owner == t] for t in range(teams)]  # the SAEs of each team

    def slowest(seconds: list[float]) -> float:
        """The seconds of the slowest team, from those of each SAE."""
        return max(sum(seconds[i] for i in part) for part in parts)

    def evaluation(whole: bool) -> float:
        """The seconds per batch of evaluating all SAEs."""
        passes = [len(variants_of(run_cfg, whole)) for run_cfg in group]
        return slowest([n * (forward + r) for n, r in zip(passes, reconstruction)]) + forward

    steps = num_steps(cfg) - steps_done
    batches = len(eval_batches(store))
    evaluations = max((num_steps(cfg) - 1) // cfg["perf_log_freq"] - steps_done // cfg["perf_log_freq"], 0)
    seconds = slowest(step) + harvest / ranks
    training = steps * seconds
    with_dead = training + steps * max(slowest(step_with_dead) - slowest(step), 0)
    baseline = 2 * forward + harvest  # evaluation.heldout_baseline
    evaluating = evaluations * evaluation(whole=False) + batches * (evaluation(whole=True) + baseline)
    if ranks > 1:
        received = cfg["batch_size"] * store.act_size * store.storage.element_size() * (ranks - 1) / ranks
        needed = max(memory_needed([group[i] for i in part], store.model) for part in parts if part)
        numbers, speedup = ", ".join(str(len(part)) for part in parts), (sum(step) + harvest / shards.count) / seconds
        who = "rank" if teams == ranks else f"team of {shards.count} ranks"
        tell(
            f"SAEs per {who}: {numbers} (ranks without an SAE run the language model for the others); at most "
            f"{gib(needed)} of memory for each rank; {received / 2**20:.1f} MiB of activations received per rank and "
            f"step; expected speed-up over one {who} {speedup:.1f}"
        )
    shortest, longest = duration(training + evaluating), duration(with_dead + evaluating)
    span = f" to {longest}, depending on how many features die" if longest != shortest else ""
    tell(
        f"Estimated time: {shortest}{span}: {duration(training)} for {count_of(steps, 'step')} of "
        f"{training / steps:.2g} s ({harvest / ranks:.2g} s of it in the language model), "
        f"{duration(evaluating)} for evaluation"
    )
    days = (training + evaluating) / 86400
    if days > MAX_DAYS and not force:
        raise too_small(f"it would take {days:,.0f} days", SHORTER)
    return owners


def assign(group: list[dict], seconds: list[float], model, available: int) -> list[int]:
    """The team of each SAE. The slowest SAE is assigned first, each to the team with the least work among those with
    enough memory. If one fits on no team, the times are ignored and all SAEs are assigned by memory.
    """
    teams = distributed.size() // group[0]["feature_shards"]
    parts, work, owners = [[] for _ in range(teams)], [0.0] * teams, [0] * len(group)
    for i in sorted(range(len(group)), key=lambda i: -seconds[i]):
        fits = [t for t in range(teams) if memory_needed([*parts[t], group[i]], model) <= available]
        if not fits:
            parts = split(group, model, available)
            return [next(t for t, part in enumerate(parts) if cfg in part) % teams for cfg in group]
        owners[i] = min(fits, key=lambda t: work[t])
        parts[owners[i]].append(group[i])
        work[owners[i]] += seconds[i]
    return owners


def step_times(cfgs: list[dict], x: torch.Tensor) -> list[tuple[float, float, float]]:
    """For a new SAE of each config, the seconds of a step, of a step with many dead features, and of a reconstruction
    of x [batch_size, d]; 0 for an SAE with NaN or infinity. As in training, the SAEs take turns, so that no SAE's
    weights are still in the CPU cache. Small SAEs step side by side: of each, the seconds are its share.

    Many dead features are those that are not active in x. If n_batches_to_dead is small, about so many die early in
    training, and the aux loss over them can take several times as long as the rest of a step.
    """
    runs = []
    for cfg in cfgs:
        sae = SAE_CLASSES[cfg["sae_type"]](cfg, team(cfg["feature_shards"]))
        runs.append(Run(cfg, sae, make_optimizer(sae, cfg), log=None))

    def timed_step(run: Run) -> float:
        outputs = []
        seconds = time_call(partial(group_step, [run], x, outputs, {}), run.cfg["device"])
        bar.update()
        return 0.0 if isinstance(outputs[0], FloatingPointError) else seconds  # training will report it

    def take_turns(which: list[int], turns: int) -> dict[int, float]:
        """The seconds of a step of each of these runs: the better of the last two."""
        seconds = []
        for _ in range(turns):
            for i in which:  # the same dead features in each turn: for another number of them CUDA needs other graphs
                runs[i].sae.num_batches_not_active.copy_(counters[i])
                runs[i].sae.known_counts = None
                graph_key(runs[i].sae, len(x))  # reads the counts here, so that this is not timed
            seconds.append([timed_step(runs[i]) for i in which])
        return {i: min(times[-2:]) for i, times in zip(which, zip(*seconds))}

    warm_up = 5 if x.is_cuda else 2  # on CUDA the first steps record CUDA graphs
    dying = [
        i for i, run in enumerate(runs)
        if run.sae.aux_loss_on_dead_features and run.cfg["n_batches_to_dead"] < num_steps(run.cfg)
    ]  # fmt: skip
    total = len(runs) * (warm_up + 3) + len(dying) * (warm_up - 1)
    with tqdm(total=total, desc="measuring", leave=False, delay=2, disable=distributed.rank() > 0) as bar:
        counters = [torch.zeros_like(run.sae.num_batches_not_active) for run in runs]
        step = take_turns(list(range(len(runs))), warm_up + 2)
        share, small = 1.0, [i for i, cfg in enumerate(cfgs) if step[i] and is_small(cfg)]
        if len(small) > 1:
            side_by_side = [partial(group_step, [runs[i] for i in small], x, [], {}) for _ in range(2)]
            share = min(time_call(turn, "cpu") for turn in side_by_side) / sum(step[i] for i in small)
        for i in dying:
            counters[i][runs[i].sae.num_batches_not_active > 0] = runs[i].cfg["n_batches_to_dead"]
        step_with_dead = step | take_turns(dying, warm_up - 1)
        reconstruction = []
        for run in runs:
            with torch.no_grad():
                reconstruction.append(time_call(partial(run.sae.reconstruct, x), run.cfg["device"]))
            bar.update()
    found = []
    for i in range(len(runs)):
        part = share if i in small else 1
        found.append((step[i] * part, step_with_dead[i] * part, reconstruction[i]) if step[i] else (0.0,) * 3)
    return found


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
    return count_of(max(1, round(seconds)), "second")
