"""What is on the disk: SAEs and checkpoints, in safetensors and JSON; loading runs no code.

A checkpoint is all that a group of runs needs to go on as if it had never stopped:

    output_dir/sweep/groups/<hash of its runs>/step_000000600/00.safetensors …   a run's SAE and optimizer
                                                              state.json         step, stream, runs, provenance
                                                              manifest.json      SHA-256 of the others; written last

Everything is written under a temporary name, flushed, and renamed, so a kill leaves the old or the new.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from safetensors.torch import load_file

from config import InputError, one_line, post_init_cfg, tell
from sae import SAE_CLASSES, BaseAutoencoder

# What state.json holds: steps taken, seconds it took, the store's state, the last step in each run's metrics.jsonl.
STATE = {"step": int, "seconds": float, "stream": dict, "logged": dict, "runs": list, "provenance": dict}
# What SAEs were once saved without. It is no part of what they compute: it stays as an untrained one has it.
ADDED_LATER = ("batches_until_sparse",)
WEIGHTS_SHA256 = "weights_sha256"  # the key of sae/cfg.json that is none of the config
CHECKPOINT_INTERVAL = 900  # seconds between checkpoints, unless writing them is slow


class SaveError(RuntimeError):
    """Something could not be written. One line says what; the same command goes on once there is room."""

    exit_code = 3


# SAEs


def save_sae(sae: BaseAutoencoder, folder: Path) -> None:
    """Write sae_weights.safetensors and cfg.json with its SHA-256 to `folder`; a kill leaves the old one or the new."""
    temporary, old = Path(f"{folder}.tmp"), old_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights, cfg = serialized(sae, sae.cfg)
    write(temporary / "sae_weights.safetensors", weights)
    write_json(temporary / "cfg.json", cfg)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)  # from here to the next line saved_sae finds the SAE there
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def serialized(sae: BaseAutoencoder, cfg: dict) -> tuple[bytes, dict]:
    """An SAE's sae_weights.safetensors and cfg.json."""
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in sae.state_dict().items()})
    return weights, cfg | {WEIGHTS_SHA256: hashlib.sha256(weights).hexdigest()}


def old_of(folder: Path) -> Path:
    return Path(f"{folder}.old")


def saved_sae(folder: Path) -> Path | None:
    """Where the SAE is that was saved to `folder`: there, or beside it where save_sae was cut off; None if nowhere."""
    return next((place for place in (folder, old_of(folder)) if place.is_dir()), None)


def load_sae(folder: str | Path, device: str | None = None) -> BaseAutoencoder:
    """The SAE of a run's folder or of its sae/ folder, in eval mode, on `device` (the config's by default).

    Raises InputError if the folder holds no SAE, weights that do not fit its config, or a file of weights with another
    SHA-256 than cfg.json gives (older ones give none). No more memory is taken than the weights' file is worth,
    whatever the config says.
    """
    folder = saved_sae(Path(folder) / "sae") or saved_sae(Path(folder)) or Path(folder)
    weights = folder / "sae_weights.safetensors"
    for file in (weights, folder / "cfg.json"):
        if not file.is_file():
            raise InputError(f"{folder} holds no SAE: there is no {file.name}")
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        recorded = cfg.pop(WEIGHTS_SHA256, None)
        if recorded is not None and recorded != sha256_of(weights):
            raise InputError(f"{weights} is corrupt: its SHA-256 is not that of {folder / 'cfg.json'}")
        cfg = post_init_cfg(cfg | {"device": device or "cpu"})
        tensors = load_file(weights)
        # Before an SAE of any size is built.
        check_tensor("W_dec", described(tensors.get("W_dec")), f"{cfg['dtype']} {[cfg['dict_size'], cfg['act_size']]}")
        sae = SAE_CLASSES[cfg["sae_type"]](cfg)
        load_weights(sae, tensors)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return sae.eval()


def load_weights(sae: BaseAutoencoder, tensors: dict) -> None:
    """Put a saved state into an SAE. Raises ValueError unless it is one of this SAE, to the shapes and dtypes."""
    state = sae.state_dict()
    tensors = {name: state[name] for name in ADDED_LATER if name in state} | tensors
    for name in [*state, *tensors]:
        check_tensor(name, described(tensors.get(name)), described(state.get(name)))
    sae.load_state_dict(tensors)


def check_tensor(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"{name} is {found}; by its config it must be {wanted}")


def described(tensor) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Checkpoints


class Checkpoints:
    """The checkpoints of a group of runs (training.Run). If there is one that holds them all, it is loaded.

    `step`, `seconds` and `stream` (the store's state; None at the beginning) are those of the newest; `ahead` has the
    runs, by name, that have taken one step more, each with the numbers of that step's output. Raises InputError
    if what they were made with differs from `provenance`, unless resume_anyway, or if all that there are are damaged.
    """

    def __init__(self, runs: list, provenance: dict, resume_anyway: bool):
        self.runs, self.provenance, self.cfg = runs, provenance, runs[0].cfg
        self.folder = group_folder([run.cfg for run in runs])
        paths = {newest_checkpoint(run.cfg) for run in runs}
        if len(paths) > 1:
            found = ", ".join(sorted(str(path.name if path else "none") for path in paths))
            raise InputError(f"these runs cannot go on together: their newest checkpoints are {found}")
        path = paths.pop()
        state = {"step": 0, "seconds": 0.0, "stream": None, "logged": {}}
        if path:
            state = json.loads((path / "state.json").read_text())
        self.step, self.seconds, self.stream, self.logged = (state[k] for k in ("step", "seconds", "stream", "logged"))
        self.ahead = state.get("ahead", {})
        if path:
            check_provenance(state["provenance"], provenance, path, resume_anyway)
            load_checkpoint(path, state, runs)
            tell(f"Going on after step {self.step}, from {path}")
        self.begun = self.saved_at = time.time()
        self.took = 0.0

    def due(self, step: int) -> bool:
        """Every checkpoint_freq steps, and every 15 minutes if writing one takes less than 2 % of the time so."""
        pause = max(CHECKPOINT_INTERVAL, 50 * self.took)
        return step % self.cfg["checkpoint_freq"] == 0 or time.time() - self.saved_at > pause

    def save(self, step: int, stream: dict, ahead: dict | None = None) -> None:
        """Save the runs as they are after `step` (those in `ahead`, after the next one), unless a checkpoint of `step`
        is there. Raises SaveError as save_errors says.
        """
        if step <= self.step or not self.runs:
            return
        begun = time.time()
        state = {"step": step, "seconds": self.elapsed(), "stream": stream, "provenance": self.provenance}
        state |= {"logged": {run.cfg["name"]: run.log.last_step for run in self.runs}, "ahead": ahead or {}}
        with disk(self.cfg, f"the checkpoint after step {step}"):
            for run in self.runs:
                run.log.sync()
            save_checkpoint(self.folder, self.runs, state, self.cfg["keep_checkpoints"])
            self.step = step
        self.saved_at, self.took = time.time(), time.time() - begun

    def elapsed(self) -> float:
        """Seconds of training, those before a stop included."""
        return self.seconds + time.time() - self.begun


@contextmanager
def disk(cfg: dict, what: str):
    """Where something cannot be written: the end (SaveError), or a line about it, as save_errors says."""
    try:
        yield
    except OSError as error:
        line = f"{what} cannot be written: {error.strerror or error}"
        if cfg["save_errors"] == "stop":
            raise SaveError(f"{line}; once it can, the same command goes on from the last checkpoint") from error
        tell(f"{line}; training goes on without (save_errors)")


def save_checkpoint(folder: Path, runs: list, state: dict, keep: int) -> None:
    """Write a checkpoint of `runs` (each with .sae, .optimizer, .cfg) into `folder`, and delete all but the newest
    `keep` once it has been read back. `state` holds "step" and whatever else is to come back, in plain values.

    Raises OSError if it cannot be written; the older ones are left as they are then.
    """
    path = folder / f"step_{state['step']:09}"
    temporary = path.with_name(path.name + ".tmp")
    for left_over in folder.glob("step_*.tmp"):
        shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    if not (folder / "runs.json").exists():  # whose checkpoints these are, should their own files be damaged
        write_json(folder / "runs.json", {"runs": [run.cfg["name"] for run in runs]})
    digests = {}
    for name, run in {f"{i:02}.safetensors": run for i, run in enumerate(runs)}.items():
        digests[name] = write(temporary / name, safetensors.torch.save(tensors_of(run)))
    state = state | {"runs": [run.cfg["name"] for run in runs]}
    digests["state.json"] = write(temporary / "state.json", json.dumps(state, indent=2).encode())
    write_json(temporary / "manifest.json", digests)
    if path.exists():  # damaged, or it would have been gone on from
        shutil.rmtree(path)
    temporary.rename(path)
    sync_folder(folder)
    if problem := damage(path):
        raise OSError(f"{path} was written, but {problem}")
    older = sorted(old for old in folder.glob("step_*[0-9]") if old.name < path.name)
    for old in older[: len(older) + 1 - keep] if keep <= len(older) else ():
        remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint: it is none from the first moment on. One that cannot be deleted does no harm."""
    with suppress(OSError):
        temporary = path.with_name(path.name + ".tmp")
        path.rename(temporary)
        shutil.rmtree(temporary)


def tensors_of(run) -> dict:
    """The SAE's parameters and buffers as sae.*, Adam's state of parameter i as adam.i.*"""
    tensors = {f"sae.{name}": tensor for name, tensor in run.sae.state_dict().items()}
    for i, values in run.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{key}": tensor for key, tensor in values.items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def load_checkpoint(path: Path, state: dict, runs: list) -> None:
    """Load each run's SAE and optimizer; `state` is that of the checkpoint's state.json."""
    for run in runs:
        try:
            tensors = load_file(path / f"{state['runs'].index(run.cfg['name']):02}.safetensors")
            load_weights(run.sae, part(tensors, "sae"))
            run.optimizer.load_state_dict({
                "state": adam_state(tensors, run.optimizer.param_groups[0]["params"]),
                "param_groups": run.optimizer.state_dict()["param_groups"],
            })  # fmt: skip
        except Exception as error:
            raise InputError(f"{path} does not fit {run.cfg['name']}: {' '.join(str(error).split())[:300]}") from error


def adam_state(tensors: dict, parameters: list) -> dict:
    """Adam's state of each parameter that ever had a gradient. torch does not look, and would read beyond its ends."""
    state = {i: part(tensors, f"adam.{i}") for i in range(len(parameters))}
    state = {i: values for i, values in state.items() if values}
    for i, values in state.items():
        shapes = {key: tuple(value.shape) for key, value in values.items()}
        if shapes != {"step": (), "exp_avg": (shape := tuple(parameters[i].shape)), "exp_avg_sq": shape}:
            raise ValueError(f"adam.{i} has {shapes} for a parameter of shape {shape}")
    if not state:
        raise ValueError("there is no state of the optimizer")
    return state


def part(tensors: dict, prefix: str) -> dict:
    """Copies: what safetensors gives is a view of the file, which would keep that from being deleted."""
    return {k.removeprefix(f"{prefix}."): tensor.clone() for k, tensor in tensors.items() if k.startswith(f"{prefix}.")}


def run_folder(cfg: dict) -> Path:
    return Path(cfg["output_dir"]) / cfg["sweep"] / cfg["name"]


def group_folder(cfgs: list[dict]) -> Path:
    """Where a group of these runs keeps its checkpoints."""
    names = "\n".join(sorted(cfg["name"] for cfg in cfgs))
    return groups_folder(cfgs[0]) / hashlib.sha256(names.encode()).hexdigest()[:12]


def groups_folder(cfg: dict) -> Path:
    return Path(cfg["output_dir"]) / cfg["sweep"] / "groups"


def newest_checkpoint(cfg: dict) -> Path | None:
    """The sound one with the most steps that holds this run; None if it was never saved, or its record was taken away.

    Damaged ones are told of and passed over. Raises InputError if there are damaged ones only: what was trained may
    be in them, and nothing is to be begun anew over that.
    """
    if not (run_folder(cfg) / "config.json").is_file():
        return None
    damaged = []
    for path in sorted(groups_folder(cfg).glob("*/step_*[0-9]"), key=lambda path: path.name, reverse=True):
        if (runs := runs_of(path)) is not None and cfg["name"] not in runs:
            continue
        problem = damage(path)
        if not problem:
            return path
        damaged.append(path)
        tell_once(f"{path} is damaged ({problem}): it is passed over")
    if damaged:
        raise InputError(
            f"{damaged[0].parent} holds only damaged checkpoints of {cfg['name']}: move it away to train it from the "
            f"beginning"
        )
    return None


def runs_of(path: Path) -> set[str] | None:
    """The names of the runs in a checkpoint, or in its group; None if they cannot be told."""
    for file in (path / "state.json", path.parent / "runs.json"):
        try:
            return set(json.loads(file.read_text())["runs"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if all that it needs is there and as its manifest has it."""
    try:
        files = tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir()))
    except OSError as error:
        return error.strerror
    return damage_of_files(path, files)


@functools.lru_cache  # reading gigabytes once for all the runs of a group
def damage_of_files(path: Path, files: tuple) -> str | None:
    try:
        digests = json.loads((path / "manifest.json").read_text())
        for name in sorted({"state.json", *digests}):
            if Path(name).name != name:
                return f"manifest.json names {name!r}"
            if sha256_of(path / name) != digests.get(name):
                return f"{name} has not the SHA-256 that manifest.json gives"
        state = json.loads((path / "state.json").read_text())
        for key, kind in STATE.items():
            if not isinstance(state[key], kind):
                return f"{key} in state.json is no {kind.__name__}"
        if not {f"{i:02}.safetensors" for i in range(len(state["runs"]))} <= set(digests):
            return "it lacks the weights of some of its runs"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except Exception as error:  # whatever JSON can be
        return f"its JSON is not that of a checkpoint: {one_line(error)}"
    return None


def check_provenance(before: dict, now: dict, path: Path, resume_anyway: bool) -> None:
    """Raises InputError where a checkpoint was made with something else than there is now, or tells of it."""
    before, now = (made_with | made_with["versions"] for made_with in (before, now))
    changed = [
        f"{key} was {before.get(key)} and is {now[key]}" for key in now
        if key not in ("versions", "commit", "python") and before.get(key) != now[key]
    ]  # fmt: skip
    if changed and not resume_anyway:
        raise InputError(f"{path} cannot be gone on from: {'; '.join(changed)} (--resume-anyway does it all the same)")
    if changed:
        tell(f"{path}: {'; '.join(changed)}; going on all the same")


def remove_checkpoints(cfg: dict, is_over) -> None:
    """Delete those of a sweep whose runs are over, all of them: is_over(name)."""
    folder = groups_folder(cfg)
    with suppress(OSError):
        for group in list(folder.iterdir()):
            runs = [runs_of(path) for path in group.glob("step_*[0-9]")]
            if runs and all(names is not None and all(map(is_over, names)) for names in runs):
                for path in group.glob("step_*[0-9]"):
                    remove(path)
                shutil.rmtree(group)
        folder.rmdir()  # if it is empty


tell_once = functools.cache(tell)


# Files


def write(path: Path, content: bytes) -> str:
    """Write a file, flush it; the SHA-256 of what should be in it."""
    path.write_bytes(content)
    sync(path)
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, flush it, rename it, and flush the folder: all the names that it has."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, json.dumps(content, indent=2).encode() + b"\n")
    temporary.replace(path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Wait until a written file is on the disk, so that the rename after it cannot outrun its content."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """The same for the names in a folder, where the system allows it."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
