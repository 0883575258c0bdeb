"""Saving and loading SAEs: safetensors and JSON, written atomically; loading runs no code."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from config import InputError, post_init_cfg
from sae import SAE_CLASSES, BaseAutoencoder


def save_sae(sae: BaseAutoencoder, folder: Path) -> None:
    """Write sae_weights.safetensors and cfg.json to `folder`; a kill leaves the old folder or the new one."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, temporary / "sae_weights.safetensors"
    )
    write_json(temporary / "cfg.json", sae.cfg)
    for file in temporary.iterdir():
        sync(file)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_sae(folder: str | Path, device: str | None = None) -> BaseAutoencoder:
    """The SAE of a run's folder or of its sae/ folder, in eval mode, on `device` (the config's by default).

    Raises InputError if the folder holds no SAE, or weights that do not fit its config.
    """
    folder = Path(folder)
    folder = folder / "sae" if (folder / "sae").is_dir() else folder
    weights = folder / "sae_weights.safetensors"
    for file in (weights, folder / "cfg.json"):
        if not file.is_file():
            raise InputError(f"{folder} holds no SAE: there is no {file.name}")
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        cfg = post_init_cfg(cfg | {"device": device or "cpu"})
        sae = SAE_CLASSES[cfg["sae_type"]](cfg)
        sae.load_state_dict(load_file(weights))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return sae.eval()


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, flush it, rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a written file is on the disk, so that the rename after it cannot outrun its content."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
