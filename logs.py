"""Writes the record of a run to its folder, and optionally to Weights & Biases.

output_dir/sweep/name/config.json     the completed config, and _provenance: versions, model, data and device
                      metrics.jsonl   one line per logged step
                      histograms.json of held-out tokens and features (see evaluation.py), if finished
                      result.json     final metrics on held-out tokens, if finished
                      stopped.json    step and reason, if NaN or infinity stopped the run
"""

import errno
import functools
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import filelock
import torch
import wandb

from checkpoint import remove, run_folder, runs_of, saved_sae
from console import InputError, one_line, tell, tell_once
from files import SaveError, read_json, replace, write_json
from language_model import model_fingerprint

WANDB_TIMEOUT = 30  # seconds to wait for Weights & Biases at the end of a run


class RunLog:
    """The record of one run, and a lock on it against other processes, which the OS releases when the process ends.

    Raises InputError if the run has ended or another process trains it, or if the folder cannot be written.
    """

    def __init__(self, cfg: dict, provenance: dict):
        self.cfg, self.provenance, self.folder = cfg, provenance, run_folder(cfg)
        self.metrics = self.wandb_run = None
        self.unwritten, self.last_step = b"", 0
        self.lock = lock(cfg)
        if has_ended(self.folder):
            self.close()
            over = "a finished run" if is_finished(cfg) else f"a run that was stopped: {why_stopped(self.folder)}"
            raise InputError(f"{self.folder} is {over}. To train it again, change its config or move the folder")

    def start(self, step: int, logged: int) -> None:
        """Resume after `step`, the step of the checkpoint: later lines are removed. `logged` is the step of the last
        line that the run had logged by then. Both are 0 for a new run.

        Raises InputError if config.json is corrupt, if lines up to `logged` are missing, or if there is an SAE but no
        checkpoint to resume from; SaveError if the folder cannot be written.
        """
        path = self.folder / "metrics.jsonl"
        lines = complete_lines(path.read_bytes()) if path.exists() else []
        lines = [line for line in lines if line["step"] <= step]
        self.last_step = lines[-1]["step"] if lines else 0
        if step == 0 and saved_sae(self.folder / "sae"):
            raise InputError(
                f"{self.folder} has an SAE but no checkpoint to resume from: to train it again, move the folder"
            )
        if self.last_step != logged:
            raise InputError(
                f"{path} does not match the checkpoint after step {step}: its last valid line before is of step "
                f"{self.last_step}, not {logged}. Restore the file, or move the folder to train the run again"
            )
        recorded = read_json(self.folder / "config.json").get("_provenance", {})
        # A resumed run keeps its id; two runs of the same config have different ids.
        wandb_id = recorded.pop("wandb_id", None) or secrets.token_hex(4)
        made_with = history(recorded, self.provenance, step) | {"wandb_id": wandb_id}
        try:
            write_json(self.folder / "config.json", self.cfg | {"_provenance": made_with})
            replace(path, b"".join(map(as_line, lines)))
            self.metrics = open(path, "ab", buffering=0)
        except OSError as error:
            raise SaveError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        self.wandb_run = start_wandb(self.cfg, self.folder, wandb_id)
        for line in lines:
            self.mirror(line)

    def log(self, step: int, tokens: int, metrics: dict) -> None:
        """Write a line. Raises OSError if that fails; the line is then kept and written with the next one."""
        line = {"step": step, "tokens": tokens} | metrics
        self.last_step = step
        self.unwritten += as_line(line)
        self.mirror(line)
        self.flush()

    def flush(self) -> None:
        """Write the lines that are not written yet, all or none. Raises OSError."""
        size = os.fstat(self.metrics.fileno()).st_size
        try:
            if self.metrics.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.metrics.truncate(size)
            raise
        self.unwritten = b""

    def sync(self) -> None:
        """Write all logged lines to the disk. Raises OSError."""
        self.flush()
        os.fsync(self.metrics.fileno())

    def mirror(self, line: dict) -> None:
        """Log a line to Weights & Biases, unless it has this step already (in a resumed run) or has failed."""
        if self.wandb_run and line["step"] >= self.wandb_run.step:
            self.in_wandb(lambda run: run.log(line, step=line["step"]))

    def in_wandb(self, function) -> None:
        """Call a function with the W&B run. If it fails, mirroring stops; the local record stays complete."""
        try:
            if self.wandb_run:
                function(self.wandb_run)
        except Exception as error:
            failed = f"{self.cfg['name']}: Weights & Biases failed ({one_line(error)})"
            tell(f"{failed}: no more mirroring of this run", any_rank=True)
            self.wandb_run = None

    def stop(self, step: int, reason: str) -> None:
        """End a run that cannot be trained further, and record the reason."""
        self.sync()
        write_json(self.folder / "stopped.json", {"step": step, "reason": reason})
        self.close()

    def finish(self, result: dict) -> None:
        """End a run. result.json is written last: a run without it is evaluated again."""
        self.sync()
        write_json(self.folder / "histograms.json", result["histograms"])
        self.in_wandb(lambda run: run.summary.update(result))
        self.in_wandb(lambda run: run.finish())
        self.wandb_run = None
        (self.folder / "evaluation.json").unlink(missing_ok=True)  # of the SAE before it was finished
        write_json(self.folder / "result.json", {key: result[key] for key in result if key != "histograms"})
        self.close()

    def close(self) -> None:
        """Release the folder, and end an unfinished W&B run."""
        self.in_wandb(lambda run: run.finish(exit_code=1))
        self.wandb_run = None
        if self.metrics:
            self.metrics.close()
        if self.lock.is_locked:
            self.lock.release()
            if has_ended(self.folder):
                with suppress(OSError):
                    Path(self.lock.lock_file).unlink()


def lock(cfg: dict) -> filelock.FileLock:
    """Create the run's folder and lock it. Raises InputError if another process has, or if that cannot be written."""
    folder = run_folder(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock", blocking=False)
        held.acquire()
    except filelock.Timeout as error:
        raise InputError(f"{folder} is being trained by another process") from error
    except OSError as error:
        raise InputError(f"output_dir = {cfg['output_dir']!r} cannot be written to: {error}") from error
    return held


def check_folders(cfgs: list[dict]) -> None:
    """Raise InputError if output_dir cannot be written to, or if another process trains one of these runs. RunLog does
    that too, but only once the language model is loaded and the steps are measured. Creates no folder.
    """
    output_dir = cfgs[0]["output_dir"]
    folder = Path(output_dir).absolute()
    try:
        tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())).close()
    except OSError as error:
        raise InputError(f"output_dir = {output_dir!r} cannot be written to: {error}") from error
    for cfg in cfgs:
        if run_folder(cfg).is_dir():
            lock(cfg).release()


def as_line(content: dict) -> bytes:
    return json.dumps(content).encode() + b"\n"


def complete_lines(written: bytes) -> list[dict]:
    """The JSON lines before the first that is incomplete or corrupt."""
    lines = []
    for line in written.split(b"\n")[:-1]:  # a killed run may leave half a line at the end
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not isinstance(content, dict) or "step" not in content:
            break
        lines.append(content)
    return lines


def is_finished(cfg: dict) -> bool:
    return (run_folder(cfg) / "result.json").is_file()


def why_stopped(folder: Path) -> str | None:
    """Why the run in this folder was stopped: step and reason, or that stopped.json is corrupt; None if it was not."""
    try:
        stopped = read_json(folder / "stopped.json")
    except InputError as error:
        return str(error)
    return f"step {stopped.get('step')}: {stopped.get('reason')}" if stopped else None


def has_ended(folder: Path) -> bool:
    """Whether the run in this folder is finished, or NaN or infinity stopped it."""
    return (folder / "result.json").is_file() or why_stopped(folder) is not None


def remove_checkpoints(sweep: Path) -> None:
    """Delete the checkpoints of those groups of a sweep in which every run has ended."""
    with suppress(OSError):
        for group in list((sweep / "groups").iterdir()):
            # runs.json stands for a checkpoint whose removal was interrupted.
            runs = [runs_of(path) for path in (*group.glob("step_*[0-9]"), *group.glob("runs.json"))]
            if runs and all(names is not None and all(has_ended(sweep / name) for name in names) for names in runs):
                for path in group.glob("step_*[0-9]"):
                    remove(path)
                shutil.rmtree(group)
        (sweep / "groups").rmdir()  # if it is empty


def start_wandb(cfg: dict, folder: Path, wandb_id: str):
    """The W&B run of this SAE, or None. Never prompts the user, never stops training.

    An online run is resumed by its id. W&B cannot resume an offline run, so it is written again from its first line,
    and the old files are renamed, so that a later `wandb sync` creates one run.
    """
    mode = cfg["wandb_mode"] or os.environ.get("WANDB_MODE") or "online"
    if mode == "disabled" or (mode == "online" and not is_online()):
        return None
    try:
        cut_off = list((folder / "wandb").glob("offline-run-*")) if mode == "offline" else []
        run = wandb.init(
            project=cfg["wandb_project"], name=cfg["name"], group=cfg["sweep"], config=cfg, mode=mode, dir=folder,
            id=wandb_id, resume="allow" if mode == "online" else None, reinit="create_new",
            settings=wandb.Settings(silent=True, finish_timeout=WANDB_TIMEOUT, finish_timeout_raises=True),
        )  # fmt: skip
        for old in cut_off:
            old.rename(old.with_name(f"replaced-{old.name}"))
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
    except Exception as error:
        tell_once(f"Weights & Biases failed to start ({one_line(error)}): metrics are logged to the run folders only.")
        return None
    tell_once(f"Weights & Biases: {run.project_url or f'{mode} files in {folder.parent}/*/wandb'}")
    return run


@functools.cache  # slow without a network
def is_online() -> bool:
    """Whether Weights & Biases can be reached and the user is logged in. Prints a line if not."""
    try:
        problem = "" if wandb.login(prompt=False) else "Not logged in to Weights & Biases"
    except Exception as error:
        problem = f"Weights & Biases cannot be reached ({one_line(error)})"
    if problem:
        tell(f"{problem}: metrics are logged to the run folders only.")
    return not problem


def history(recorded: dict, now: dict, step: int) -> dict:
    """The provenance to record for a run that is resumed after `step`: `now`, with the step after which it applies,
    "after_step", and the list of provenances before it, "earlier", each with its own "after_step". A provenance whose
    steps were all discarded is dropped.
    """
    earlier = [*recorded.get("earlier", []), {key: recorded[key] for key in recorded if key != "earlier"}]
    earlier = [entry for entry in earlier if entry and entry.get("after_step", 0) < step]
    if earlier and now.items() <= earlier[-1].items():
        step = earlier.pop().get("after_step", 0)
    return now | {"after_step": step, "earlier": earlier}


def provenance(model, activation_store) -> dict:
    """What determines a run besides its config: versions, commit, device, fingerprints of language model and text."""
    packages = ("torch", "numpy", "transformer_lens", "transformers", "datasets", "tokenizers")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git repository
    return {
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "commit": commit,
        "device": activation_store.cfg["device"],
        "feature_shards": activation_store.cfg["feature_shards"],
        "model_sha256": model_fingerprint(model),
        "heldout_tokens_sha256": activation_store.fingerprint(),
        **hardware(activation_store.cfg["device"]),
        **activation_store.stream.reader.fingerprint(),
    }


def hardware(device: str) -> dict:
    """What affects rounding: on a CPU the number of threads; on a GPU its kind, the CUDA version, and whether the
    language model uses TF32.
    """
    if not device.startswith("cuda"):
        return {"threads": torch.get_num_threads()}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability})"
    return {"card": name, "cuda": torch.version.cuda, "model_in_tf32": os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"}
