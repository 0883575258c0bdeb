"""The demo's text: the source code of the running Python's own standard library.

It is on every machine, so nothing has to be shipped or downloaded. A stable hash of each file's path
splits it by file into three parts that never mix, whatever the Python version:

    lm       what the demo's language model was trained on (the library's test folders join it)
    sae      what the demo's SAEs are trained on; the language model has never seen it
    heldout  what both are judged on

The tables in encodings/ and the generated text in pydoc_data/ are neither in "sae" nor in "heldout": they are a
quarter of the library, and so unlike the rest that their share would decide every mean.
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
    """The part ("lm", "sae" or "heldout") that a file of the standard library belongs to; None: to none of them."""
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
    """The files of one part as [{"file": relative path, "text": its source}], in an order given by the hash.

    Raises FileNotFoundError where this Python ships without the source of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = [path for path in paths if not {"site-packages", "dist-packages"} & set(path.parts)]
    found = []
    for path in sorted(paths, key=path_hash):
        if part_of(path) == part:
            try:
                with tokenize.open(root / path) as file:  # honours the file's coding line
                    found.append({"file": path.as_posix(), "text": file.read()})
            except (SyntaxError, UnicodeDecodeError):
                continue  # deliberately broken files among the library's tests
    if not found:
        raise FileNotFoundError(
            f"the demo's text is the source of Python's standard library, and {root} has none of it"
        )
    return found


def write_demo_text(path: Path) -> Path:
    """Write the SAE's text as JSON lines, the held-out files first: the store holds out the start of its stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write it at once
    with open(temporary, "w", encoding="utf-8") as file:
        for document in documents("heldout") + documents("sae"):
            file.write(json.dumps(document) + "\n")
    temporary.replace(path)
    return path
