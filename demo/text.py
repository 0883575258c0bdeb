"""The demo's text: the source code of the running Python's standard library.

It is on every machine, so it need not be shipped or downloaded. A hash of each file's path assigns the file to one of
three parts, the same for every Python version:

    lm       training data of the demo's language model, including the library's test folders
    sae      training data of the demo's SAEs, which the language model has not seen
    heldout  evaluation data for both

The tables in encodings/ and the generated text in pydoc_data/ are excluded from "sae" and "heldout". They are a quarter
of the library and so different from the rest that they would dominate every mean.
"""

import hashlib
import json
import os
import sysconfig
import tokenize
from pathlib import Path

TEST_FOLDERS = {"test", "tests", "idle_test"}
TABLE_FOLDERS = {"encodings", "pydoc_data"}


def part_of(relative_path: Path) -> str | None:
    """The part of a file of the standard library: "lm", "sae", "heldout", or None if it is excluded."""
    if TEST_FOLDERS & set(relative_path.parts):
        return "lm"
    share = path_hash(relative_path) % 100
    if share >= 52:
        return "lm"
    if TABLE_FOLDERS & set(relative_path.parts):
        return None
    return "heldout" if share < 12 else "sae"


def path_hash(relative_path: Path) -> int:
    return int.from_bytes(hashlib.sha256(relative_path.as_posix().encode()).digest()[:8], "big")


def documents(part: str) -> list[dict]:
    """The files of one part as [{"file": relative path, "text": source}], ordered by hash.

    Raises FileNotFoundError if this Python has no source code of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = {*subfolders} - {"site-packages", "dist-packages"}
        paths += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    found = []
    for path in sorted(paths, key=path_hash):
        if part_of(path) == part:
            try:
                with tokenize.open(root / path) as file:  # uses the declared encoding
                    found.append({"file": path.as_posix(), "text": file.read()})
            except (SyntaxError, UnicodeDecodeError):
                continue  # deliberately invalid files in the library's tests
    if not found:
        raise FileNotFoundError(
            f"the demo's text is the source code of Python's standard library, which is not in {root}"
        )
    return found


def write_demo_text(path: Path) -> Path:
    """Write the SAEs' text as JSON lines, held-out files first, because the store holds out the start of its stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write it concurrently
    with open(temporary, "w", encoding="utf-8") as file:
        for document in documents("heldout") + documents("sae"):
            file.write(json.dumps(document) + "\n")
    temporary.replace(path)
    return path
