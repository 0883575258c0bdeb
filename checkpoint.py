"""Saves and loads SAEs and checkpoints, as safetensors and JSON; loading runs no code.

A checkpoint holds everything that a group of runs needs to resume with bit-identical results:

    output_dir/sweep/groups/<hash of its runs>/step_000000600/00.safetensors …   a run's SAE and optimizer
                                                              state.json         step, stream, runs, provenance
                                                              manifest.json      SHA-256 of the others; written last

With feature_shards = 4, each rank writes its slice of a run: 00.0.safetensors to 00.3.safetensors.

Folders, like files (files.py), are written under a temporary name, flushed and renamed.
"""

import functools
import hashlib
import json
import math
import shutil
import struct
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import safetensors.torch
import torch
from safetensors.torch import load_file

import distributed
from config import post_init_cfg
from console import InputError, gib, one_line, out_of_memory, tell, tell_once
from files import SaveError, sha256_of, sync, sync_folder, write, write_json
from sae import FEATURE_DIM, SAE_CLASSES, BaseAutoencoder

# Keys of state.json; logged: the last step in each run's metrics.jsonl; stream: the store's state.
STATE = {"step": int, "seconds": float, "stream": dict, "logged": dict, "runs": list, "provenance": dict}
# Buffers that older SAE files lack. They do not affect the SAE's output and keep their initial values.
ADDED_LATER = ("batches_until_sparse",)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
WEIGHTS_SHA256 = "weights_sha256"  # the only key of sae/cfg.json that is not part of the config
MAX_CHECKPOINT_INTERVAL = 900  # seconds, unless writing is slow


# SAEs


def save_sae(sae: BaseAutoencoder, folder: Path) -> None:
    """Write sae_weights.safetensors and cfg.json with its SHA-256 to `folder`; a kill leaves the old or the new SAE.

    The ranks that share an SAE write one file together, without gathering it in memory. Raises OSError on each of them.
    """
    temporary, old, shards = Path(f"{folder}.tmp"), backup_path(folder), sae.shards
    file = temporary / "sae_weights.safetensors"

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if shards.count > 1:
            header, _, size = layout(sae)
            with open(file, "wb") as created:
                created.write(header)
                created.truncate(size)

    def finish():
        if shards.count > 1:
            cfg = sae.cfg | {WEIGHTS_SHA256: sha256_of(file)}
        else:
            weights, cfg = serialized(sae, sae.cfg)
            write(file, weights)
        write_json(temporary / "cfg.json", cfg)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)  # if killed before the next line, saved_sae finds the SAE there
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    shards.on(0, begin)
    if shards.count > 1:
        for turn in range(shards.count):  # not at once: slices share pages, which NFS writes as a whole
            shards.on(turn, partial(write_slices, sae, file))
    shards.on(0, finish)


def layout(sae: BaseAutoencoder) -> tuple[bytes, dict, int]:
    """The safetensors file of a sharded SAE: its header, where each tensor begins, and its size."""
    entries, end = {}, 0
    for name, tensor in sorted(sae.state_dict().items(), key=lambda item: -item[1].itemsize):  # keeps them aligned
        shape, dim = list(tensor.shape), FEATURE_DIM.get(name)
        if dim is not None:
            shape[dim] = sae.cfg["dict_size"]
        begin, end = end, end + tensor.itemsize * math.prod(shape)
        entries[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header
    return header, {name: len(header) + e["data_offsets"][0] for name, e in entries.items()}, len(header) + end


def write_slices(sae: BaseAutoencoder, file: Path) -> None:
    """Write this rank's slice of each tensor to its place in the file. The first rank writes what all have."""
    shards, (_, places, _) = sae.shards, layout(sae)
    with open(file, "rb+") as out:  # "wb" would empty it
        for name, tensor in sae.state_dict().items():
            dim = FEATURE_DIM.get(name)
            if dim is None and shards.index > 0:
                continue
            outer, count = (tensor.shape[0] if dim == 1 else 1), (1 if dim is None else shards.count)
            rows = tensor.detach().cpu().reshape(outer, -1).numpy()  # of each row of W_enc [d, F], a part
            for i, row in enumerate(rows):
                out.seek(places[name] + (i * count + shards.index) * row.nbytes)
                out.write(np.ascontiguousarray(row))
    sync(file)


def serialized(sae: BaseAutoencoder, cfg: dict) -> tuple[bytes, dict]:
    """The contents of an SAE's sae_weights.safetensors and cfg.json."""
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in sae.state_dict().items()})
    return weights, cfg | {WEIGHTS_SHA256: hashlib.sha256(weights).hexdigest()}


def backup_path(folder: Path) -> Path:
    return Path(f"{folder}.old")


def saved_sae(folder: Path) -> Path | None:
    """The SAE saved to `folder`, or its backup if save_sae was interrupted; None if there is neither."""
    return next((path for path in (folder, backup_path(folder)) if path.is_dir()), None)


def load_sae(folder: str | Path, device: str | None = None) -> BaseAutoencoder:
    """The SAE in a run's folder or its sae/ folder, in eval mode, on `device` (default: CPU). Relative
    model and dataset paths in its cfg are found from any folder (paths_from_here).

    Raises InputError if the folder holds no SAE, the weights do not fit its config, or their SHA-256 differs from that
    in cfg.json (older files have none), or the device has too little memory. Memory use is bounded by the size of the
    weights file, whatever the config says.
    """
    folder = saved_sae(Path(folder) / "sae") or saved_sae(Path(folder)) or Path(folder)
    weights = folder / "sae_weights.safetensors"
    for file in (weights, folder / "cfg.json"):
        if not file.is_file():
            raise InputError(f"{folder} holds no SAE: {file.name} is missing")
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        recorded = cfg.pop(WEIGHTS_SHA256, None)
        if recorded is not None and recorded != sha256_of(weights):
            raise InputError(f"{weights} is corrupt: its SHA-256 differs from that in {folder / 'cfg.json'}")
        cfg = post_init_cfg(cfg | {"device": device or "cpu"})
        cfg |= paths_from_here(folder.parent, cfg)
        check_memory(weights, cfg["device"])
        tensors = load_file(weights)
        # Before an SAE of that size is allocated.
        check_tensor("W_dec", describe(tensors.get("W_dec")), f"{cfg['dtype']} {[cfg['dict_size'], cfg['act_size']]}")
        sae = SAE_CLASSES[cfg["sae_type"]](cfg)
        load_weights(sae, tensors)
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error
    return sae.eval()


def paths_from_here(run: Path, cfg: dict) -> dict:
    """The paths in a run's config that are relative to the folder in which it was trained and do not exist from here,
    as paths that do. That folder is known if output_dir is relative too and the run has not been moved.
    """
    inside = Path(cfg["output_dir"], cfg["sweep"], cfg["name"]).parts
    parts = run.resolve().parts
    if parts[-len(inside) :] != inside:
        return {}
    folder = Path(*parts[: -len(inside)])
    paths = {key: folder / cfg[key] for key in ("model_name", "dataset_path")}
    return {key: str(path) for key, path in paths.items() if path.exists() and not Path(cfg[key]).exists()}


def check_memory(weights: Path, device: str) -> None:
    free = psutil.virtual_memory().available
    if device.startswith("cuda"):  # torch also has memory that it no longer uses
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    if (size := weights.stat().st_size) > free:
        raise InputError(f"{weights} does not fit on {device}: it needs {gib(size)}, and {gib(free)} are free")


def load_weights(sae: BaseAutoencoder, tensors: dict) -> None:
    """Load a saved state into an SAE. Raises ValueError unless names, shapes and dtypes match."""
    state = sae.state_dict()
    tensors = {name: state[name] for name in ADDED_LATER if name in state} | tensors
    for name in [*state, *tensors]:
        check_tensor(name, describe(tensors.get(name)), describe(state.get(name)))
    sae.load_state_dict(tensors)
    sae.known_counts = None


def check_tensor(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{name} is {found}; its config requires {expected}")


def describe(tensor) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Checkpoints


class Checkpoints:
    """The checkpoints of a group of runs with the configs `cfgs`. The ranks save a checkpoint together.

    Loads the newest checkpoint that holds all of them into `runs`, the runs (training_step.Run) of this rank. `step`,
    `seconds` and `stream` (the store's state; None at the beginning) are those of this checkpoint. `ahead` maps the
    names of runs that have taken one step more to the values in that step's output. Raises InputError if the
    checkpoint's provenance differs from `provenance`, unless resume_anyway, or if there are only corrupt checkpoints.
    """

    def __init__(self, cfgs: list[dict], runs: list, provenance: dict, resume_anyway: bool):
        self.cfg, self.provenance = cfgs[0], provenance
        self.runs = runs  # the list itself, from which train_steps removes the runs that NaN stops
        self.folder = group_folder(cfgs)
        path, state = distributed.from_rank_0(lambda: find_checkpoint(cfgs, provenance, resume_anyway))
        self.step, self.seconds, self.stream, self.logged = (state[k] for k in ("step", "seconds", "stream", "logged"))
        self.ahead = state.get("ahead", {})
        if path:
            load_checkpoint(path, state, runs)
            tell(f"Resuming after step {self.step} from {path}")
        self.started_at = self.saved_at = time.time()
        self.save_seconds = 0.0

    def due(self, step: int) -> bool:
        """Every checkpoint_freq steps, and every 15 minutes unless saving would then take over 2 % of the time."""
        interval = max(MAX_CHECKPOINT_INTERVAL, 50 * self.save_seconds)
        return step % self.cfg["checkpoint_freq"] == 0 or time.time() - self.saved_at > interval

    def save(self, step: int, stream: dict, ahead: dict | None = None) -> None:
        """Save the runs after `step` (those in `ahead` after the next step), unless a checkpoint of `step` exists.

        Raises SaveError if it cannot be written and save_errors is "stop".
        """
        logged = dict(distributed.gather_lists([(run.cfg["name"], run.log.last_step) for run in self.runs if run.log]))
        if step <= self.step or not logged:
            return
        started_at = time.time()
        state = {"step": step, "seconds": self.elapsed(), "stream": stream, "provenance": self.provenance}
        state |= {"runs": list(logged), "logged": logged, "ahead": ahead or {}}
        with handle_save_errors(self.cfg["save_errors"], f"the checkpoint after step {step}", any_rank=False):
            save_checkpoint(self.folder, self.runs, state, self.cfg["keep_checkpoints"])
            self.step = step
        self.saved_at, self.save_seconds = time.time(), time.time() - started_at

    def elapsed(self) -> float:
        """Seconds of training, including those before resuming."""
        return self.seconds + time.time() - self.started_at


def find_checkpoint(cfgs: list[dict], provenance: dict, resume_anyway: bool) -> tuple[Path | None, dict]:
    """The newest checkpoint of these runs and its state; None and the state of the beginning if there is none."""
    paths = {newest_checkpoint(cfg) for cfg in cfgs}
    if len(paths) > 1:
        found = ", ".join(sorted(str(path or "none") for path in paths))
        raise InputError(f"these runs cannot be resumed together: their newest checkpoints are {found}")
    path = paths.pop()
    if path is None:
        return None, {"step": 0, "seconds": 0.0, "stream": None, "logged": {}}
    state = json.loads((path / "state.json").read_text())
    check_provenance(state["provenance"], provenance, path, resume_anyway)
    return path, state


@contextmanager
def handle_save_errors(save_errors: str, what: str, any_rank: bool = True):
    """Handle failed writes as the config's save_errors says: raise SaveError, or report them and continue."""
    try:
        yield
    except OSError as error:
        line = f"{what} cannot be written: {error.strerror or error}"
        if save_errors == "stop":
            raise SaveError(f"{line}; once this is fixed, the same command resumes from the last checkpoint") from error
        tell(f"{line}; training continues without it (save_errors)", any_rank)


def save_checkpoint(folder: Path, runs: list, state: dict, keep: int) -> None:
    """Write a checkpoint of the runs named in state["runs"] to `folder`, verify it, and delete all but the newest
    `keep`. Each rank writes its own `runs` (each with .sae, .optimizer, .cfg, .log). `state` holds "step", "runs" and
    further values that JSON can hold.

    Raises OSError on every rank if it cannot be written; older checkpoints are then kept.
    """
    path = folder / f"step_{state['step']:09}"
    temporary = path.with_name(path.name + ".tmp")
    digests = {}  # the SHA-256 of each file

    def begin():
        for unfinished in folder.glob("step_*.tmp"):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
        # This file tells whose checkpoints these are, even if their own files are corrupt.
        if not (folder / "runs.json").exists():
            write_json(folder / "runs.json", {"runs": state["runs"]})

    def write_runs():
        for run in runs:
            if run.log:
                run.log.sync()
            file = temporary / file_of(state, run.cfg["name"], run.sae.shards.index)
            digests[file.name] = write(file, safetensors.torch.save(tensors_of(run)))
            if sha256_of(file) != digests[file.name]:
                raise OSError(f"{file} was written, but its SHA-256 differs")

    def finish():
        digests["state.json"] = write(temporary / "state.json", json.dumps(state, indent=2).encode())
        write_json(temporary / "manifest.json", digests)
        if path.exists():  # corrupt, or the runs would have resumed from it
            shutil.rmtree(path)
        temporary.rename(path)
        sync_folder(folder)
        older = sorted((old for old in folder.glob("step_*[0-9]") if old.name < path.name), reverse=True)
        for old in older[keep - 1 :]:
            remove(old)

    distributed.from_rank_0(begin)
    distributed.on_all(write_runs)
    digests = dict(distributed.gather_lists(list(digests.items())))
    distributed.from_rank_0(finish)


def shards_of(state: dict) -> int:
    """The number of shards of each SAE in a checkpoint."""
    return state["provenance"].get("feature_shards", 1)


def file_of(state: dict, name: str, shard: int) -> str:
    """The file of a run, or of one of its shards, in a checkpoint."""
    number = f"{state['runs'].index(name):02}"
    return f"{number}.safetensors" if shards_of(state) == 1 else f"{number}.{shard}.safetensors"


def remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one is never found; failures are ignored."""
    with suppress(OSError):
        temporary = path.with_name(path.name + ".tmp")
        path.rename(temporary)
        shutil.rmtree(temporary)


def tensors_of(run) -> dict:
    """The SAE's parameters and buffers as sae.*, Adam's state for parameter i as adam.i.*"""
    tensors = {f"sae.{name}": tensor for name, tensor in run.sae.state_dict().items()}
    for i, values in run.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{key}": tensor for key, tensor in values.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_checkpoint(path: Path, state: dict, runs: list) -> None:
    """Load each run's SAE and optimizer; `state` is the content of the checkpoint's state.json."""
    for run in runs:
        try:
            tensors = load_slice(path, state, run)
            load_weights(run.sae, with_prefix(tensors, "sae"))
            run.optimizer.load_state_dict({
                "state": adam_state(tensors, run.optimizer.param_groups[0]["params"]),
                "param_groups": run.optimizer.state_dict()["param_groups"],
            })  # fmt: skip
        except Exception as error:
            if out_of_memory(error):
                raise
            raise InputError(f"{path} does not fit {run.cfg['name']}: {one_line(error)}") from error


def load_slice(path: Path, state: dict, run) -> dict:
    """This rank's slice of a run's tensors in a checkpoint, which may have another number of shards."""
    shards, count, name = run.sae.shards, shards_of(state), run.cfg["name"]
    if count == shards.count:
        return load_file(path / file_of(state, name, shards.index))
    own, size, parts = shards.features(run.cfg["dict_size"]), run.cfg["dict_size"] // count, {}
    for shard in range(own.start // size, -(-own.stop // size)):
        wanted = slice(max(own.start - shard * size, 0), own.stop - shard * size)
        for key, tensor in load_file(path / file_of(state, name, shard)).items():  # mapped: reads only what is used
            dim = feature_dim(key, run.sae)
            part = tensor if dim is None else tensor[wanted] if dim == 0 else tensor[:, wanted]
            parts.setdefault(key, []).append(part)
    dims = {key: feature_dim(key, run.sae) for key in parts}
    return {key: parts[key][0] if dim is None else torch.cat(parts[key], dim) for key, dim in dims.items()}


def feature_dim(key: str, sae: BaseAutoencoder) -> int | None:
    """The dimension of features in a tensor of a checkpoint (tensors_of); None if all shards have the same."""
    kind, name = key.split(".", 1)
    if kind == "sae":
        return FEATURE_DIM.get(name)
    i, moment = name.split(".")
    parameter = [name for name, _ in sae.named_parameters()][int(i)]
    return None if parameter == "b_dec" or moment == "step" else 0


def adam_state(tensors: dict, parameters: list) -> dict:
    """Adam's state for each parameter that has had a gradient. The shapes are checked here because torch does not."""
    state = {}
    for i, parameter in enumerate(parameters):
        if values := with_prefix(tensors, f"adam.{i}"):
            shape, shapes = tuple(parameter.shape), {key: tuple(value.shape) for key, value in values.items()}
            if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
                raise ValueError(f"adam.{i} has {shapes} for a parameter of shape {shape}")
            state[i] = values
    if not state:
        raise ValueError("the optimizer state is missing")
    return state


def with_prefix(tensors: dict, prefix: str) -> dict:
    """The tensors named prefix.*, copied: safetensors maps the file, which could then not be deleted."""
    return {k.removeprefix(f"{prefix}."): tensor.clone() for k, tensor in tensors.items() if k.startswith(f"{prefix}.")}


def run_folder(cfg: dict) -> Path:
    return Path(cfg["output_dir"]) / cfg["sweep"] / cfg["name"]


def group_folder(cfgs: list[dict]) -> Path:
    """The folder for the checkpoints of a group of these runs."""
    names = "\n".join(sorted(cfg["name"] for cfg in cfgs))
    return groups_folder(cfgs[0]) / hashlib.sha256(names.encode()).hexdigest()[:12]


def groups_folder(cfg: dict) -> Path:
    return Path(cfg["output_dir"]) / cfg["sweep"] / "groups"


def newest_checkpoint(cfg: dict) -> Path | None:
    """The valid checkpoint of this run with the most steps; None if there is none, or the run has no config.json.

    Corrupt checkpoints are reported and skipped. Raises InputError if all are corrupt: training from the beginning
    would overwrite what they hold.
    """
    if not (run_folder(cfg) / "config.json").is_file():
        return None
    corrupt = []
    for path in sorted(groups_folder(cfg).glob("*/step_*[0-9]"), key=lambda path: path.name, reverse=True):
        if (runs := runs_of(path)) is not None and cfg["name"] not in runs:
            continue
        problem = find_corruption(path)
        if not problem:
            return path
        corrupt.append(path)
        tell_once(f"{path} is corrupt ({problem}): skipped")
    if corrupt:
        raise InputError(
            f"{corrupt[0].parent} holds only corrupt checkpoints of {cfg['name']}: move this folder away to train from "
            f"the beginning"
        )
    return None


def runs_of(path: Path) -> set[str] | None:
    """The names of the runs in a checkpoint or in its group; None if neither file can be read."""
    for file in (path / "state.json", path.parent / "runs.json"):
        try:
            return set(json.loads(file.read_text())["runs"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
    return None


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete and matches its manifest."""
    try:
        files = tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir()))
    except OSError as error:
        return error.strerror
    return find_corruption_in_files(path, files)


@functools.lru_cache  # read gigabytes once for all runs of a group
def find_corruption_in_files(path: Path, files: tuple) -> str | None:
    try:
        digests = json.loads((path / "manifest.json").read_text())
        for name in sorted({"state.json", *digests}):
            if Path(name).name != name:
                return f"manifest.json names {name!r}"
            if sha256_of(path / name) != digests.get(name):
                return f"the SHA-256 of {name} differs from that in manifest.json"
        state = json.loads((path / "state.json").read_text())
        for key, kind in STATE.items():
            if not isinstance(state[key], kind):
                return f"{key} in state.json is not of type {kind.__name__}"
        if not {file_of(state, run, i) for run in state["runs"] for i in range(shards_of(state))} <= set(digests):
            return "the weights of some of its runs are missing"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except Exception as error:  # JSON of any other form
        return f"its JSON is not that of a checkpoint: {one_line(error)}"
    return None


def check_provenance(before: dict, now: dict, path: Path, resume_anyway: bool) -> None:
    """Raise InputError if a checkpoint's provenance differs from the current one; with resume_anyway, report it."""
    before, now = ({"feature_shards": 1} | made_with | made_with["versions"] for made_with in (before, now))
    changed = [
        f"{key} was {before.get(key)} and is {now[key]}" for key in now
        if key not in ("versions", "commit", "python") and before.get(key) != now[key]
    ]  # fmt: skip
    if changed and not resume_anyway:
        raise InputError(f"cannot resume from {path}: {'; '.join(changed)} (--resume-anyway ignores this)")
    if changed:
        tell(f"{path}: {'; '.join(changed)}; resuming anyway")
