"""One local record per run, mirrored to Weights & Biases where the user wants that.

output_dir/sweep/name/config.json     the completed config, and _provenance: what the run was made with
                      metrics.jsonl   one line per logged step
                      histograms.json of those tokens and of the features, see evaluation.py
                      result.json     final metrics on held-out tokens, only when finished
                      stopped.json    in its place where NaN or infinity stopped the run
"""

import errno
import functools
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path

import filelock
import torch
import wandb

from checkpoint import SaveError, run_folder, saved_sae, write, write_json
from console import InputError, one_line, tell
from language_model import model_fingerprint

WANDB_PATIENCE = 30  # seconds that a run's end waits for Weights & Biases to take what is left of it


class RunLog:
    """The record of one run, and the lock that keeps other processes off it (until this one ends, however it ends).

    Raises InputError if the run is over or another process has it, or if the folder cannot be written.
    """

    def __init__(self, cfg: dict, provenance: dict):
        self.cfg, self.provenance, self.folder = cfg, provenance, run_folder(cfg)
        self.metrics = self.wandb_run = None
        self.unwritten, self.last_step = b"", 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.folder / ".lock", blocking=False)
            self.lock.acquire()
        except filelock.Timeout as error:
            raise InputError(f"{self.folder} is being trained by another process") from error
        except OSError as error:
            raise InputError(f"output_dir = {cfg['output_dir']!r} cannot be written to: {error}") from error
        if is_over(cfg):
            self.close()
            over = "a finished run" if is_finished(cfg) else f"a run that was stopped: {why_stopped(cfg)}"
            raise InputError(f"{self.folder} is {over}. Change its config, or move the folder away, to train it again")

    def start(self, step: int, logged: int) -> None:
        """Go on after `step`, the last line before which was that of step `logged` (0, 0: at the beginning). What was
        logged after it, of which no checkpoint knows, is taken back.

        Raises InputError if what was logged before is not there, or if there is an SAE and no checkpoint to go on from;
        SaveError if the disk is full.
        """
        path = self.folder / "metrics.jsonl"
        lines = complete_lines(path.read_bytes()) if path.exists() else []
        lines = [line for line in lines if line["step"] <= step]
        self.last_step = lines[-1]["step"] if lines else 0
        if step == 0 and saved_sae(self.folder / "sae"):
            raise InputError(
                f"{self.folder} holds an SAE, and no checkpoint to go on from: move the folder away to train it again"
            )
        if self.last_step != logged:
            raise InputError(
                f"{path} does not fit the checkpoint after step {step}: its last sound line before is of step "
                f"{self.last_step}, not {logged}. Put it back, or move the folder away to train it again"
            )
        recorded = read_json(self.folder / "config.json").get("_provenance", {})
        # Two runs of one config are two runs there, a run that goes on is one.
        wandb_id = recorded.pop("wandb_id", None) or secrets.token_hex(4)
        made_with = history(recorded, self.provenance, step) | {"wandb_id": wandb_id}
        try:
            write_json(self.folder / "config.json", self.cfg | {"_provenance": made_with})
            write(path.with_suffix(".tmp"), b"".join(map(as_line, lines)))
            path.with_suffix(".tmp").replace(path)
            self.metrics = open(path, "ab", buffering=0)
        except OSError as error:
            raise SaveError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        self.wandb_run = start_wandb(self.cfg, self.folder, wandb_id)
        for line in lines:
            self.mirror(line)

    def log(self, step: int, tokens: int, metrics: dict) -> None:
        """Raises OSError if the line cannot be written; it is kept, and written with the next."""
        line = {"step": step, "tokens": tokens} | metrics
        self.last_step = step
        self.unwritten += as_line(line)
        self.mirror(line)
        self.flush()

    def flush(self) -> None:
        """Write whole lines or nothing. Raises OSError."""
        size = os.fstat(self.metrics.fileno()).st_size
        try:
            if self.metrics.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.metrics.truncate(size)
            raise
        self.unwritten = b""

    def sync(self) -> None:
        """Have all that was logged on the disk. Raises OSError."""
        self.flush()
        os.fsync(self.metrics.fileno())

    def mirror(self, line: dict) -> None:
        """Log a line to Weights & Biases, unless it has it (a run that goes on) or has failed."""
        if self.wandb_run and line["step"] >= self.wandb_run.step:
            self.in_wandb(lambda run: run.log(line, step=line["step"]))

    def in_wandb(self, function) -> None:
        """It may fail at any moment: the local record is complete without it."""
        try:
            if self.wandb_run:
                function(self.wandb_run)
        except Exception as error:
            tell(f"{self.cfg['name']}: Weights & Biases failed ({one_line(error)}), and gets no more of this run")
            self.wandb_run = None

    def stop(self, step: int, reason: str) -> None:
        """The end of a run that cannot be trained on: its record says why."""
        self.sync()
        write_json(self.folder / "stopped.json", {"step": step, "reason": reason})
        self.close()

    def finish(self, result: dict) -> None:
        """The end of a run. result.json comes last: a run without it is evaluated again."""
        self.sync()
        write_json(self.folder / "histograms.json", result["histograms"])
        self.in_wandb(lambda run: run.summary.update(result))
        self.in_wandb(lambda run: run.finish())
        self.wandb_run = None
        (self.folder / "evaluation.json").unlink(missing_ok=True)  # of the SAE before it was finished
        write_json(self.folder / "result.json", {key: result[key] for key in result if key != "histograms"})
        self.close()

    def close(self) -> None:
        """Let go of the folder, and of a W&B run that has not come to its end."""
        self.in_wandb(lambda run: run.finish(exit_code=1))
        self.wandb_run = None
        if self.metrics:
            self.metrics.close()
        if self.lock.is_locked:
            self.lock.release()
            if is_over(self.cfg):
                with suppress(OSError):
                    Path(self.lock.lock_file).unlink()


def as_line(content: dict) -> bytes:
    return json.dumps(content).encode() + b"\n"


def complete_lines(content: bytes) -> list[dict]:
    """Of JSON lines, those before the first that was cut off."""
    lines = []
    for line in content.splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            return lines[:-1]
    return lines


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def is_finished(cfg: dict) -> bool:
    return (run_folder(cfg) / "result.json").is_file()


def why_stopped(cfg: dict) -> str | None:
    """Of a run that cannot be trained on: at which step, and why."""
    stopped = read_json(run_folder(cfg) / "stopped.json")
    return f"step {stopped.get('step')}: {stopped.get('reason')}" if stopped else None


def is_over(cfg: dict) -> bool:
    return is_finished(cfg) or why_stopped(cfg) is not None


def start_wandb(cfg: dict, folder: Path, wandb_id: str):
    """The W&B run of this SAE, or None. Never asks the user anything, never ends the training.

    An online run goes on under its id. Offline a run cannot go on, so it is written anew from its first line, and what
    was there is set aside: a later `wandb sync` makes one run of it.
    """
    mode = cfg["wandb_mode"] or os.environ.get("WANDB_MODE") or "online"
    if mode == "disabled" or (mode == "online" and not is_online()):
        return None
    try:
        cut_off = list((folder / "wandb").glob("offline-run-*")) if mode == "offline" else []
        run = wandb.init(
            project=cfg["wandb_project"], name=cfg["name"], group=cfg["sweep"], config=cfg, mode=mode, dir=folder,
            id=wandb_id, resume="allow" if mode == "online" else None, reinit="create_new",
            settings=wandb.Settings(silent=True, finish_timeout=WANDB_PATIENCE, finish_timeout_raises=True),
        )  # fmt: skip
        for old in cut_off:
            old.rename(old.with_name(f"replaced-{old.name}"))
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
    except Exception as error:
        tell_once(f"Weights & Biases cannot be used ({one_line(error)}): metrics are logged to the run folders only.")
        return None
    tell_once(f"Weights & Biases: {run.project_url or f'{mode} files in {folder.parent}/*/wandb'}")
    return run


tell_once = functools.cache(tell)  # one line for all the runs of a sweep


@functools.cache  # without a network it takes a while
def is_online() -> bool:
    """Whether Weights & Biases can be reached and knows the user; a line where not."""
    try:
        problem = "" if wandb.login(prompt=False) else "Not logged in to Weights & Biases"
    except Exception as error:
        problem = f"Weights & Biases cannot be reached ({one_line(error)})"
    if problem:
        tell(f"{problem}: metrics are logged to the run folders only.")
    return not problem


def history(recorded: dict, now: dict, step: int) -> dict:
    """The provenance of a run that goes on after `step`: `now`, with "after_step", the step after which it holds, and
    "earlier", the list of those that held before, each with its own. Those of whose steps nothing is left are left out.
    """
    earlier = [*recorded.get("earlier", []), {key: recorded[key] for key in recorded if key != "earlier"}]
    earlier = [made_with for made_with in earlier if made_with and made_with.get("after_step", 0) < step]
    if earlier and now.items() <= earlier[-1].items():
        step = earlier.pop().get("after_step", 0)
    return now | {"after_step": step, "earlier": earlier}


def provenance(model, activation_store) -> dict:
    """What a run is made with: versions, commit, and fingerprints of the language model and of the text."""
    packages = ("torch", "numpy", "transformer_lens", "transformers", "datasets", "tokenizers")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without its repository
    return {
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "commit": commit,
        "threads": torch.get_num_threads(),
        "device": activation_store.cfg["device"],
        "model_sha256": model_fingerprint(model),
        "heldout_tokens_sha256": activation_store.fingerprint(),
        **card(activation_store.cfg["device"]),
        **activation_store.stream.reader.fingerprint(),
    }


def card(device: str) -> dict:
    """The card, the CUDA version and whether the language model uses TF32: rounding depends on them. {} on a CPU."""
    if not device.startswith("cuda"):
        return {}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability})"
    return {"card": name, "cuda": torch.version.cuda, "model_in_tf32": os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"}
