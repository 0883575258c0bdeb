"""Reads and writes files. They are written under a temporary name, flushed and renamed, so that after a kill the old or
the new version is there. Imports no torch, so results.py starts fast.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from console import InputError, one_line


class SaveError(RuntimeError):
    """A file could not be written. The message is one line; the same command resumes once there is space."""

    exit_code = 3


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} if there is no file. Raises InputError if it is corrupt or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is corrupt: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is corrupt: it holds a {type(content).__name__}, not a dict")
    return content


def write_json(path: Path, content: dict) -> None:
    replace(path, json.dumps(content, indent=2).encode() + b"\n")


def replace(path: Path, content: bytes) -> str:
    """Write a file under a temporary name, flush it, rename it, and flush the folder; returns its SHA-256."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        digest = write(temporary, content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # it may have filled the disk
        raise
    sync_folder(path.parent)
    return digest


def write(path: Path, content: bytes) -> str:
    """Write and flush a file; returns its SHA-256."""
    path.write_bytes(content)
    sync(path)
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a written file to disk, so that it is complete before it is renamed."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk, where the system supports it."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
