"""Opens a dataset: finds its files, split and column, and streams rows that hold only this column.

`datasets` reads the files. By default it casts all columns of all files to their types in the first file, and fails if
one cannot be cast. Here the other columns are dropped before the cast.
"""

import codecs
import functools
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
from datasets.builder import Key
from datasets.data_files import FILES_TO_IGNORE, DataFilesList, _get_data_files_patterns
from datasets.packaged_modules.json.json import FullReadDisallowed
from datasets.packaged_modules.json.json import Json as JsonBuilder
from datasets.utils.file_utils import readline, xopen
from fsspec.utils import glob_translate
from pandas.errors import ParserWarning

from console import InputError, one_line, tell
from hub import is_hub_name, is_transient, offline_hint

TOKEN_COLUMNS = ("tokens", "input_ids")  # columns that hold only tokens
COLUMNS = (*TOKEN_COLUMNS, "text")  # the columns to read if dataset_column is None, in order of preference
BUILDERS = {
    ".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
# In a folder of several kinds of file, these are preferred; .json comes last.
PREFERRED_KINDS = (".txt", ".jsonl", ".parquet", ".arrow")
METADATA = (*FILES_TO_IGNORE, "state.json")  # files that `datasets` writes next to the data
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
SPACE = re.compile(r"\s*")


def load_text(cfg: dict) -> tuple[datasets.IterableDataset, str, list[str], str | None]:
    """The dataset of a config as a stream of rows, their column, the names of its shards, and its commit on the hub.

    dataset_path is a local file, a folder of files of one kind, a dataset saved with save_to_disk, or a hub dataset,
    which is streamed. Raises InputError if it cannot be opened, is empty, or lacks the split or the column.
    """
    path = Path(cfg["dataset_path"])
    datasets.disable_progress_bars()
    # What the libraries log they also raise, and it is then reported in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset, column = saved_dataset(cfg, path)
            names, commit = [str(path)], None
        elif path.exists():
            builder, names = local_builder(cfg, path)
            dataset, column = one_column(builder, "train", cfg)
            commit = None
        elif file_kind(path) or not is_hub_name(cfg["dataset_path"]):
            raise InputError(f"{where(cfg)}: no such file or folder, and not a hub name")
        else:
            builder = hub_builder(cfg)
            dataset, column = one_column(builder, cfg["dataset_split"], cfg)
            names = [f"shard {i + 1} of {dataset.num_shards}" for i in range(dataset.num_shards)]
            # Without a network the local cache is read. Its shards differ, so it counts as different data: no commit.
            commit = builder.hash if builder.config.data_files else None
    except InputError:
        raise
    except StopIteration as error:  # `datasets` raises this for a file without rows
        raise InputError(f"{where(cfg)} is empty") from error
    except Exception as error:
        hint = offline_hint(cfg["dataset_path"])
        raise InputError(f"{where(cfg)} cannot be opened: {one_line(error)}{hint}") from error
    return dataset, column, names, commit


def where(cfg: dict) -> str:
    """The beginning of a message about the dataset."""
    return f"dataset_path = {cfg['dataset_path']!r}"


def first_row(dataset: datasets.IterableDataset, cfg: dict) -> dict:
    """The first row. A separate iterator reads it, so the dataset still begins with it."""
    try:
        row = next(iter(dataset), None)
    except Exception as error:
        raise InputError(f"{where(cfg)} cannot be read: {one_line(error)}") from error
    if row is None:
        raise InputError(f"{where(cfg)} is empty")
    return row


# Columns


def choose_column(names, cfg: dict) -> str:
    """dataset_column, or the first of COLUMNS in `names`. If there are several, prints which one is read."""
    column = cfg["dataset_column"]
    if column is not None:
        if column not in names:
            raise InputError(f"{where(cfg)} has no column {column!r}: it has {', '.join(names)}")
        return column
    found = [name for name in COLUMNS if name in names]
    if not found:
        raise InputError(
            f"{where(cfg)} has none of the columns {', '.join(COLUMNS)}: it has {', '.join(names) or 'no columns'} "
            f"(set dataset_column to the one to read)"
        )
    if len(found) > 1:
        tell(f"{where(cfg)} has the columns {', '.join(found)}: reading {found[0]} (set dataset_column for another)")
    return found[0]


def one_column(builder: datasets.DatasetBuilder, split: str, cfg: dict) -> tuple[datasets.IterableDataset, str]:
    """The rows of a split, with only the column to read, and the name of this column."""
    if isinstance(builder, JsonBuilder) and builder.config.field is None and builder.config.encoding == "utf-8":
        return json_column(builder, split, cfg)
    dataset = builder.as_streaming_dataset(split)
    features = builder.info.features  # None for text and CSV, until they are read
    column = choose_column(features or first_row(dataset, cfg), cfg)
    if not hasattr(builder, "_cast_table"):  # it casts nothing, as the builder of the local cache
        return dataset, column
    cast, generate, report_missing = builder._cast_table, builder._generate_tables, reporter(column, cfg)

    def tables(**sources):
        (file, *_) = sources.get("files") or chain.from_iterable(sources["files_iterables"])  # called for each file

        def cast_column(table: pyarrow.Table, **options) -> pyarrow.Table:
            if column not in table.column_names:
                report_missing(file)
            values = table[column] if column in table.column_names else pyarrow.nulls(len(table))
            try:
                return cast(pyarrow.table({column: values}), **options)
            except TypeError as error:  # its message has several lines
                raise TypeError(one_line(error)) from error

        builder._cast_table = cast_column
        yield from generate(**sources)

    builder._generate_tables = tables
    if features:
        all_null = features[column] == datasets.Value("null")  # in the first file; others may hold text
        builder.info.features = datasets.Features({column: datasets.Value("string") if all_null else features[column]})
    return builder.as_streaming_dataset(split), column


def reporter(column: str, cfg: dict):
    """A function that reports, once per file, that the file lacks the column."""
    return functools.cache(lambda file: tell(f"{where(cfg)}: {file} has no column {column!r} and is skipped"))


def json_column(builder: JsonBuilder, split: str, cfg: dict) -> tuple[datasets.IterableDataset, str]:
    """one_column for JSON. It is parsed here because `datasets` infers types for all columns, and fails if they change.

    Each value is passed on as JSON, so values of one column may differ in type. Files are read in the same parts as in
    `datasets`, because positions in the stream count these parts.
    """
    unreadable = []

    def column_names(files_iterables, allow_full_read=True, **_):
        if not allow_full_read:  # `datasets` tries to infer the types of the columns
            raise FullReadDisallowed
        for file in chain.from_iterable(files_iterables):
            try:
                for rows, by_lines in json_parts(file, builder.config.chunksize):
                    if rows:
                        names = list(dict.fromkeys(name for row in rows for name in row))
                        yield Key(0, 0), pyarrow.table({"names": [names], "by_lines": [by_lines]})
                        return
            except Exception as error:  # DocumentReader stops at this file or skips it
                if is_transient(error):
                    raise
                unreadable.append(f"{where(cfg)} cannot be read: {one_line(error)} of {file}")

    def tables(files_iterables, allow_full_read=True, **_):
        if not allow_full_read:
            raise FullReadDisallowed
        for shard, file in enumerate(chain.from_iterable(files_iterables)):
            names = set()
            for part, (rows, _) in enumerate(json_parts(file, builder.config.chunksize)):
                names.update(*rows)
                values = [row.get(column) for row in rows]
                if typed:
                    values = [None if value is None else as_json(value) for value in values]
                    values = pyarrow.array(values, pyarrow.string()).cast(datasets.Json.pa_type)
                yield Key(shard, part), pyarrow.table({column: values})
            if names and column not in names:
                report_missing(file)

    card_features, builder.info.features = builder.info.features, None
    builder._generate_tables = column_names
    try:
        first = first_row(builder.as_streaming_dataset(split), cfg)
    except InputError as error:
        if unreadable and not is_transient(error):
            raise InputError(unreadable[0]) from None
        raise
    column = choose_column(first["names"], cfg)
    report_missing = reporter(column, cfg)
    # Without types, as `datasets` reads a JSON list, the stream's state has another form. Older checkpoints hold that
    # form, so it is kept.
    typed = bool(card_features) or first["by_lines"] or column not in COLUMNS
    if typed:
        builder.info.features = datasets.Features({column: datasets.Json()})
    builder._generate_tables = tables
    return builder.as_streaming_dataset(split), column


def json_parts(file: str, size: int) -> Iterator[tuple[list[dict], bool]]:
    """Yields (rows, True) for each part of about `size` bytes of a file of JSON objects; for a file that is one JSON
    list, (its elements, False).

    Raises ValueError, with the line number, for invalid JSON and for values that are not objects.
    """
    with xopen(file, "rb") as content:
        line, rest = 1, b""  # the line number where the next part begins, and an incomplete object before it
        while (part := content.read(size)) or rest:
            if line == 1 and not rest:  # the beginning of the file
                part = part.removeprefix(codecs.BOM_UTF8)
                if part.lstrip().startswith(b"["):
                    rows = json.loads(part + content.read())
                    yield [row if isinstance(row, dict) else {"text": row} for row in rows], False
                    return
            try:
                part += content.readline()
            except io.UnsupportedOperation:  # zstd
                part += readline(content)
            part, at_end = rest + part, not part
            rows, rest, error = json_rows(part, line, at_end)
            line += part.count(b"\n") - rest.count(b"\n")
            if rows or not (rest or error):
                yield rows, True
            if error:
                raise error


def json_rows(part: bytes, line: int, at_end: bool) -> tuple[list[dict], bytes, ValueError | None]:
    """Parses a part of a file that begins in line `line`. Returns its objects, the beginning of an incomplete object at
    its end (not `at_end` of the file, where that is an error), and the error that ended the parsing, if any.
    """
    with suppress(ValueError):
        rows = [json.loads(row) for row in part.splitlines() if row.strip()]
        if all(isinstance(row, dict) for row in rows):
            return rows, b"", None
    # Not one object per line, or invalid. This is slower, but gives the positions of errors.
    try:
        text = part.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        rows, _, earlier = json_rows(part[: part.rfind(b"\n", 0, error.start) + 1], line, at_end=False)
        line += part.count(b"\n", 0, error.start)
        return rows, b"", earlier or ValueError(f"{error.encoding} {error.reason}: line {line}")
    rows, at = [], 0
    while (at := SPACE.match(text, at).end()) < len(text):
        try:
            row, end = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            if not at_end and not text[error.pos :].strip():
                return rows, text[at:].encode("utf-8", "surrogatepass"), None
            return rows, b"", ValueError(f"{error.msg}: line {line + error.lineno - 1} column {error.colno}")
        if not isinstance(row, dict):
            line += text.count("\n", 0, at)
            return rows, b"", ValueError(f"line {line} is valid JSON but not an object")
        rows.append(row)
        at = end
    return rows, b"", None


def as_json(value) -> str:
    """A document as JSON. `datasets` parses it with pandas, which drops half of a surrogate pair silently, so such a
    document is replaced by an invalid one.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps({"text that is not valid Unicode": ascii(value)[:80]})
    return text


# Files and splits


def saved_dataset(cfg: dict, path: Path) -> tuple[datasets.IterableDataset, str]:
    """A dataset written by save_to_disk, and the column to read."""
    saved, split = datasets.load_from_disk(str(path)), cfg["dataset_split"]
    if isinstance(saved, dict):
        saved = saved[check_split(cfg, saved)]
    elif split != "train":
        check_split(cfg, [str(saved.split or "train")])
    # The stored format may convert to tensors and hide columns.
    saved = saved.with_format(None)
    if not len(saved):
        raise InputError(f"{where(cfg)} is empty")
    column = choose_column(saved.column_names, cfg)
    return saved.select_columns(column).to_iterable_dataset(), column


def check_split(cfg: dict, splits, note: str = "") -> str:
    if cfg["dataset_split"] not in splits:
        raise InputError(
            f"{where(cfg)} has no split {cfg['dataset_split']!r}: it has {', '.join(splits)}" + (note and f"; {note}")
        )
    return cfg["dataset_split"]


def hub_builder(cfg: dict) -> datasets.DatasetBuilder:
    """The builder of a hub dataset. Its `hash` is the commit that `datasets` resolved and reads all files from."""
    name, revision = cfg["dataset_path"], cfg["dataset_revision"]
    try:
        return datasets.load_dataset_builder(name, cfg["dataset_config"], revision=revision)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or revision is not None:
            raise
        tell(f"{name} is a loading script, which datasets no longer runs: reading its revision refs/convert/parquet")
        return datasets.load_dataset_builder(name, cfg["dataset_config"], revision="refs/convert/parquet")


def local_files(cfg: dict, path: Path) -> tuple[str, list[str]]:
    """The kind of the files to read (file_kind), and a file, or the files in a folder that belong to dataset_split, in
    alphabetical order.
    """
    files = [path] if path.is_file() else data_files(path)
    found = {file_kind(file) for file in files}
    kinds = sorted(found.intersection(PREFERRED_KINDS) or found.difference([".json"]) or found)
    if len(kinds) != 1 or not kinds[0]:
        what = f"is a file of type {path.suffix or 'unknown'}" if path.is_file() else "has no such file"
        if len(kinds) > 1:
            what = "has several types: " + ", ".join(kinds)
        raise InputError(
            f"{where(cfg)} must be a file, or a folder of files, of one of the types {', '.join(BUILDERS)} (text, JSON "
            f"and CSV also with {', '.join(COMPRESSIONS)}), but it {what}"
        )
    (kind,) = kinds
    if others := sorted(found.difference(kinds)):
        tell(f"{where(cfg)}: reading its {kind} files, not its {', '.join(others)} files")
    files = [file for file in files if file_kind(file) == kind]
    splits = {"train": files} if path.is_file() else files_by_split(path, files)
    note = ""
    if rest := sorted(set(files).difference(*splits.values())):
        note = f"{len(rest)} of its {len(files)} files belong to no split, such as {rest[0].relative_to(path)}"
    split = check_split(cfg, splits, note)
    if note:
        tell(f"{where(cfg)}: {note}")
    return kind, [str(file) for file in splits[split]]


def local_builder(cfg: dict, path: Path) -> tuple[datasets.DatasetBuilder, list[str]]:
    """The `datasets` builder for a file or for one split of a folder, and the names of its files."""
    kind, files = local_files(cfg, path)
    options = {"sample_by": "document"} if kind.startswith(".txt") else {}
    if kind.startswith((".csv", ".tsv")):  # every value is text, also "123" and "null"
        columns = [cfg["dataset_column"]] if cfg["dataset_column"] else COLUMNS
        options = {
            "converters": dict.fromkeys(columns, str),
            "keep_default_na": False,
            "index_col": False,  # otherwise the first field of a row that is longer than the header is its index
            "sep": "\t" if kind.startswith(".tsv") else ",",
        }
    # `datasets` uses a DataFilesList as it is, but would resolve each name in a plain list again.
    train_files = {"train": DataFilesList(files, [])}
    builder = datasets.load_dataset_builder(BUILDERS["." + kind.split(".")[1]], data_files=train_files, **options)
    if "index_col" in options:
        warnings.filterwarnings("error", category=ParserWarning)  # pandas warns when it drops fields
        builder._generate_tables = functools.partial(csv_tables, builder._generate_tables)
    return builder, files


def csv_tables(generate, **sources):
    try:
        yield from generate(**sources)
    except ParserWarning as error:
        raise ValueError("the header has fewer fields than the rows") from error


def file_kind(path: Path) -> str:
    """The suffix of a readable file, with that of its compression (".jsonl", ".csv.gz"); "" for other files."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    suffix = Path(path.stem).suffix if compression else path.suffix
    readable = BUILDERS.get(suffix) in ("text", "json", "csv") if compression else suffix in BUILDERS
    return suffix + compression if readable else ""


def data_files(folder: Path) -> list[Path]:
    """The readable files in a folder and its subfolders. As in `datasets`, metadata and hidden files and folders are
    ignored, and folders such as __pycache__.
    """

    def is_data(file: Path) -> bool:
        *folders, name = file.relative_to(folder).parts
        hidden = name.startswith(".") or any(part.startswith((".", "__")) for part in folders)
        return bool(file_kind(file)) and not hidden and name not in METADATA and file.is_file()

    return sorted(filter(is_data, folder.rglob("*")))


def files_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The splits that `datasets` infers from the names of files and folders; one split "train" if it finds none."""
    names = {f"data/{file.relative_to(folder).as_posix()}": file for file in files}

    def matching(pattern: str) -> list[str]:
        match = re.compile(glob_translate("data/" + pattern)).match
        return [name for name in names if match(name)]

    return {
        str(split): sorted({names[name] for pattern in patterns for name in matching(pattern)})
        for split, patterns in _get_data_files_patterns(matching).items()
    }
