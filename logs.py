"""One local record per run, mirrored to Weights & Biases where the user wants that.

output_dir/sweep/name/config.json     the completed config, and _provenance: what the run was made with
                      metrics.jsonl   one line per logged step
                      histograms.json of those tokens and of the features, see evaluation.py
                      result.json     final metrics on held-out tokens, only when finished
"""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch
import wandb

from checkpoint import write_json
from config import InputError, tell
from language_model import model_fingerprint


class RunLog:
    """The record of one run. An unfinished record of the same name is moved aside, never written over.

    Raises InputError if the run has already finished.
    """

    def __init__(self, cfg: dict, provenance: dict):
        self.folder = run_folder(cfg)
        if is_finished(cfg):
            raise InputError(
                f"{self.folder} is a finished run: change its config, or move the folder away to train it again"
            )
        if self.folder.exists():
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.unfinished{number}")).exists():
                number += 1
            self.folder.rename(aside)
            tell(f"{self.folder} was never finished: moved aside to {aside.name}, and starting again")
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"output_dir = {cfg['output_dir']!r} cannot be written to: {error}") from error
        write_json(self.folder / "config.json", cfg | {"_provenance": provenance})
        self.metrics = open(
            self.folder / "metrics.jsonl", "w", buffering=1
        )  # a line reaches the file when it is complete
        self.wandb_run = start_wandb(cfg, self.folder)

    def log(self, step: int, tokens: int, metrics: dict) -> None:
        line = {"step": step, "tokens": tokens} | metrics
        self.metrics.write(json.dumps(line) + "\n")
        if self.wandb_run:
            self.wandb_run.log(line, step=step)

    def finish(self, result: dict) -> None:
        self.metrics.close()
        write_json(self.folder / "histograms.json", result["histograms"])
        write_json(self.folder / "result.json", {key: result[key] for key in result if key != "histograms"})
        if self.wandb_run:
            self.wandb_run.summary.update(result)
            self.wandb_run.finish()


def run_folder(cfg: dict) -> Path:
    return Path(cfg["output_dir"]) / cfg["sweep"] / cfg["name"]


def is_finished(cfg: dict) -> bool:
    return (run_folder(cfg) / "result.json").is_file()


def start_wandb(cfg: dict, folder: Path):
    """A W&B run of its own for this SAE, or None. Never asks the user anything, never ends the training."""
    mode = cfg["wandb_mode"] or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "disabled")
    if mode == "disabled":
        if not (cfg["wandb_mode"] or os.environ.get("WANDB_MODE")):
            tell_once("Not logged in to Weights & Biases: metrics are logged to the run folders only.")
        return None
    try:
        run = wandb.init(
            project=cfg["wandb_project"], name=cfg["name"], group=cfg["sweep"], config=cfg, mode=mode, dir=folder,
            reinit="create_new", settings=wandb.Settings(silent=True),
        )  # fmt: skip
    except Exception as error:
        tell_once(f"Weights & Biases cannot be reached ({error}): metrics are logged to the run folders only.")
        return None
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    tell_once(f"Weights & Biases: {run.project_url or f'{mode} files in {folder.parent}/*/wandb'}")
    return run


@functools.cache
def logged_in() -> bool:
    return bool(wandb.login(prompt=False))


tell_once = functools.cache(tell)  # one line for all the runs of a sweep


def provenance(model, activation_store) -> dict:
    """What a run was made with: versions, commit, and fingerprints of the language model and of the text."""
    packages = ("torch", "transformer_lens", "transformers", "datasets", "tokenizers")
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
        "model_sha256": model_fingerprint(model),
        "heldout_tokens_sha256": activation_store.fingerprint(),
    }
