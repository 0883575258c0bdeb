"""Activations on disk, so that later runs read them instead of running the language model.

    <activation_cache>/<hash of the identity>/buffer_000000.bin   a buffer in text order, [rows, d]
                                              manifest.json       the identity; rows, SHA-256 and next stream position
                                                                  of every buffer

A buffer is written when it is harvested, so the next run can read the complete buffers of an interrupted run.
"""

import hashlib
import json
import shutil
from pathlib import Path

import filelock
import torch

from console import InputError, gib, one_line, tell
from files import SaveError, replace, write_json

ENTRY = ("rows", "sha256", "next")  # of a buffer in the manifest


class ActivationCache:
    """The buffers of one stream of activations.

    `identity` holds everything that determines the activations; `num_rows` is the number that the run needs. Prints the
    disk space needed. Raises InputError if it exceeds the free space or the folder cannot be written.
    """

    def __init__(self, folder: str, identity: dict, num_rows: int):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.identity = Path(folder) / digest, identity
        self.dtype, self.width = getattr(torch, identity["activation_dtype"]), identity["act_size"]
        where = f"activation_cache = {folder!r}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{where} cannot be written to: {error.strerror}") from error
        self.buffers, size = self.read_manifest(), identity["buffer_rows"]

        present = sum(max(0, min(entry["rows"], num_rows - i * size)) for i, entry in enumerate(self.buffers))
        row_bytes = self.width * self.dtype.itemsize
        needed, free = (num_rows - present) * row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(f"{where}: the activations need {gib(needed)} of disk space, and {gib(free)} are free")
        if needed > 0:
            tell(f"{self.folder}: {gib(needed)} of activations will be written ({gib(free)} are free)")
        if present > 0:
            tell(f"{self.folder}: {gib(present * row_bytes)} of activations are read from disk")

    def read_manifest(self) -> list[dict]:
        path = self.folder / "manifest.json"
        try:
            return [{key: entry[key] for key in ENTRY} for entry in json.loads(path.read_text())["buffers"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            tell(f"{path} is corrupt ({one_line(error)}): the activations are harvested again")
            return []

    def read(self, index: int, buffer: torch.Tensor) -> dict | None:
        """Fill `buffer` [rows, d] with the rows of cached buffer `index`, which may have more (from a longer run).
        Returns the next stream position, or None if the buffer is not cached or corrupt.
        """
        if index >= len(self.buffers) or self.buffers[index]["rows"] < len(buffer):
            return None
        path, entry = self.path(index), self.buffers[index]
        try:
            rows = torch.from_file(str(path), shared=False, size=entry["rows"] * self.width, dtype=self.dtype)
            wrong = hashlib.sha256(rows.view(torch.uint8).numpy()).hexdigest() != entry["sha256"]
            problem = "its SHA-256 is wrong" if wrong else None
        except (OSError, RuntimeError) as error:  # there is no such file, or it is too short
            problem = one_line(error)
        if problem:
            tell(f"{path} is corrupt ({problem}): its activations are harvested again")
            return None
        buffer.copy_(rows.view(-1, self.width)[: len(buffer)])
        return entry["next"]

    def write(self, index: int, buffer: torch.Tensor, next_position: dict) -> None:
        """Write `buffer` [rows, d] as buffer `index`. Raises SaveError if it cannot be written."""
        if index > len(self.buffers):
            return  # training began without this cache, and the manifest cannot have gaps
        path, entry = self.path(index), {"rows": len(buffer), "next": next_position}
        try:
            with filelock.FileLock(self.folder / ".lock", timeout=600):  # seconds; against other runs with this cache
                there = self.read_manifest()  # another run may have written since
                # Buffers after one with other rows begin elsewhere in the text.
                same = index < len(there) and {key: there[index][key] for key in entry} == entry
                entry["sha256"] = replace(path, buffer.cpu().flatten().view(torch.uint8).numpy())
                self.buffers = [*self.buffers[:index], entry, *(there[index + 1 :] if same else [])]
                write_json(self.folder / "manifest.json", {"identity": self.identity, "buffers": self.buffers})
        except OSError as error:
            raise SaveError(f"activation_cache: {path} cannot be written: {error.strerror or error}") from error

    def path(self, index: int) -> Path:
        return self.folder / f"buffer_{index:06}.bin"
