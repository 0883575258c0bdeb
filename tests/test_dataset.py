"""Opening a dataset: file types, splits, one column regardless of the others, chats."""

import bz2
import cProfile
import gzip
import json
import lzma
import pstats
import re
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from helpers import BOS, DEMO_LM, SEQ_LEN, stream_cfg
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from console import InputError
from text_stream import TextStream

TEXTS = [f"def f_{i}(x):\n    return x + {i}, 'naïve {i}'\n" * 2 for i in range(40)]
ODD = ["123", "NA", "null", 'a "quoted", text', "{}", "[1]"]  # text that a reader may parse as something else


def make_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_LM)


def stream_of(path: Path, tokenizer=None, **changes) -> TextStream:
    cfg = stream_cfg(dataset_path=str(path), **changes)
    return TextStream(cfg, tokenizer or make_tokenizer(), 4096)


def tokens_of(path: Path, tokenizer=None, **changes) -> list[int]:
    """All tokens of a dataset, held-out ones first."""
    stream = stream_of(path, tokenizer, **changes)
    tokens = stream.held_out.flatten().tolist()
    while len(part := stream.contexts(7)):
        tokens += part.flatten().tolist()
    return tokens


def expected(texts: list[str]) -> list[int]:
    """Reference: BOS and tokens of each document, concatenated, in whole contexts."""
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    tokens = [token for text in texts for token in [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]]
    return tokens[: len(tokens) // SEQ_LEN * SEQ_LEN]


def error_of(path: Path, tokenizer=None, **changes) -> str:
    with pytest.raises(InputError) as caught:
        tokens_of(path, tokenizer, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# File types


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def table(texts: list[str], separator: str) -> bytes:
    return pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_csv(index=False, sep=separator).encode()


FILES = {
    "a.json": lambda texts: json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1).encode(),
    "lines.json": lines,
    "a.ndjson": lines,
    "a.csv": lambda texts: table(texts, ","),
    "a.tsv": lambda texts: table(texts, "\t"),
    "a.jsonl.gz": lambda texts: gzip.compress(lines(texts)),
    "a.jsonl.zst": lambda texts: zstandard.compress(lines(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(lines(texts)),
    "a.json.xz": lambda texts: lzma.compress(lines(texts)),
    "a.csv.gz": lambda texts: gzip.compress(table(texts, ",")),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_json_and_csv_files(tmp_path, name, folder):
    """JSON and CSV, compressed or not, alone and in a folder: the same tokens, also after resuming from each state."""
    texts = TEXTS[:20] + ODD + TEXTS[20:]
    (tmp_path / name).write_bytes(FILES[name](texts))
    path = tmp_path if folder else tmp_path / name
    assert tokens_of(path) == expected(texts)
    stream = stream_of(path)
    while True:
        state = json.loads(json.dumps(stream.state_dict()))
        if not len(part := stream.contexts(17)):
            break
        resumed = stream_of(path)
        resumed.load_state_dict(state)
        assert resumed.contexts(17).tolist() == part.tolist()


@pytest.mark.fast
def test_compressed_text_files_are_documents(tmp_path):
    """A .txt.gz file is one document, like a .txt file."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert tokens_of(tmp_path) == expected(TEXTS)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.xlsx", "a.jsonl.rar"])
def test_other_files_are_refused(tmp_path, name):
    """The error names the suffix and the supported ones."""
    (tmp_path / name).write_bytes(b"text")
    message = error_of(tmp_path / name)
    assert message.endswith(Path(name).suffix) and ".jsonl" in message and ".zst" in message


def test_a_folder_of_several_file_types(tmp_path, capsys):
    """In a folder of .jsonl and .json files, the .jsonl files are read and this is reported; .csv and .tsv are
    ambiguous."""
    write_lines(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "about.json").write_text('{"made": "by hand"}')
    assert tokens_of(tmp_path) == expected(TEXTS)
    assert "reading its .jsonl files, not its .json files" in capsys.readouterr().err
    (tmp_path / "data.jsonl").rename(tmp_path / "data.csv")
    (tmp_path / "about.json").rename(tmp_path / "about.tsv")
    assert error_of(tmp_path).endswith("several types: .csv, .tsv")


@pytest.mark.parametrize("name", ["plain", "dataset_infos.json", "state.json", "dataset_info.json"])
def test_json_next_to_other_data_is_metadata(tmp_path, capsys, name):
    """Any other type is preferred to .json, and metadata files of a dataset are ignored, even next to .json data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (tmp_path / "data" / (name if name != "plain" else "train-1.json")).write_text('{"made": "by hand"}')
    assert tokens_of(tmp_path) == expected(TEXTS)
    assert ("not its .json files" in capsys.readouterr().err) == (name == "plain")
    (tmp_path / "data" / "train-0.jsonl.gz").unlink()
    write_lines(tmp_path / "data" / "train-0.json", [{"text": text} for text in TEXTS])
    if name != "plain":
        assert tokens_of(tmp_path) == expected(TEXTS)


JSON_LAYOUTS = {
    "list after whitespace": lambda rows: "\n " + json.dumps(rows, indent=2),
    "list after a BOM and whitespace": lambda rows: "\ufeff\r\n" + json.dumps(rows),
    "objects of many lines": lambda rows: "".join(json.dumps(row, indent=2) + "\n" for row in rows),
    "objects of many lines, joined": lambda rows: " ".join(json.dumps(row, indent=2) for row in rows),
    "two objects on a line": lambda rows: "".join(json.dumps(row) + "\n" * (i % 2) for i, row in enumerate(rows)),
    "lines, then many lines": lambda rows: "\n".join(
        json.dumps(row, indent=i // 20 or None) for i, row in enumerate(rows)
    ),
}


@pytest.mark.parametrize("noise", [1, 1_000_000, 11_000_000])
@pytest.mark.parametrize("layout", JSON_LAYOUTS)
def test_json_layouts(tmp_path, layout, noise):
    """JSON objects in any layout are rows, also if an object spans two parts of the file."""
    rows = [{"text": text, "noise": ["x" * (noise if i in (3, 17, 30) else 1)]} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.json").write_text(JSON_LAYOUTS[layout](rows))
    assert tokens_of(tmp_path) == expected(TEXTS)


@pytest.mark.parametrize(
    "bad, what",
    [
        (b'{"text": nothing}\n', "Expecting value: line 31 column 10"),
        (b'{"text": "a"} b\n', "Expecting value: line 31 column 15"),
        (b'{"text": "\xff"}\n', "invalid start byte: line 31"),
        (b'{"text":\n', "line 33 column"),
        (b"[5]\n", "line 31 is valid JSON but not an object"),
    ],
)
@pytest.mark.parametrize("noise", [1, 11_000_000])
def test_json_errors_name_the_line_of_the_file(tmp_path, bad, what, noise):
    """Also if the file is read in several parts and the last one is bad."""
    rows = [json.dumps({"text": text, "noise": "x" * (noise if i == 5 else 1)}) for i, text in enumerate(TEXTS)]
    content = ("\n".join(rows[:30]) + "\n").encode()
    (tmp_path / "a.jsonl").write_bytes(content + bad + "\n".join(rows[30:]).encode())
    assert what in error_of(tmp_path)


@pytest.mark.parametrize("last", ['{"text": "a"', '{\n"text": "a",\n', '{"text": "a'])
def test_a_truncated_last_json_object(tmp_path, last):
    """It is an error with its line; no rows are silently lost."""
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + last.encode())
    assert re.search(r"line 4[1-3] column", error_of(tmp_path))


@pytest.mark.parametrize("rows", ["x,y", "x,y\nx", "x,"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_csv_rows_longer_than_the_header(tmp_path, capsys, kind, rows):
    """Rows with more fields than the header are bad data."""
    (tmp_path / f"a.{kind}").write_bytes(table(TEXTS, "," if kind == "csv" else "\t"))
    bad = tmp_path / f"b.{kind}"
    bad.write_text(("text\n" + rows).replace(",", "," if kind == "csv" else "\t"))
    what = "the header has fewer fields than the rows"
    message = error_of(tmp_path)
    assert f"document 1 of {bad}" in message and what in message
    assert tokens_of(tmp_path, bad_documents="skip") == expected(TEXTS)
    assert what in capsys.readouterr().err and what in error_of(bad)


# Stored formats and other columns


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
@pytest.mark.fast
def test_a_stored_format_is_ignored(tmp_path, kind, split):
    """A saved dataset gives the same tokens with and without a format, whatever columns the format has."""
    ids = make_tokenizer()(TEXTS, add_special_tokens=False)["input_ids"]
    data = datasets.Dataset.from_dict({"tokens": ids, "label": list(range(len(ids)))})
    for columns in (["tokens"], ["label"]):
        data.set_format(kind, columns=columns)
        (datasets.DatasetDict({split: data}) if split else data).save_to_disk(tmp_path / columns[0])
        assert tokens_of(tmp_path / columns[0]) == expected(TEXTS)


OTHERS = {  # the other column in the first and in the second file; "gone": the file lacks it
    "null, string": (None, "x"),
    "string, null": ("x", None),
    "one key more": ("gone", "x"),
    "one key less": ("x", "gone"),
    "number, string": (1, "x"),
    "string, number": ("x", 1),
    "struct, other struct": ({"a": 1}, {"b": "x"}),
    "list, string": ([1, 2], "x"),
    "empty struct, string": ({}, "x"),
}
WRITERS = {
    "jsonl": lambda path, rows: write_lines(path, rows),
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "arrow": lambda path, rows: write_arrow(path, rows),
}


def write_arrow(path: Path, rows: list[dict]) -> None:
    data = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)


@pytest.mark.parametrize(
    "kind, others",
    [
        (k, o) for k in WRITERS for o in OTHERS if (k, o) != ("parquet", "empty struct, string")
    ],  # parquet has no empty structs
)
def test_other_columns_do_not_matter(tmp_path, kind, others):
    """If another column changes its type in the second file, or is in one file only, all text is read."""
    for name, texts, other in zip("ab", (TEXTS[:20], TEXTS[20:]), OTHERS[others]):
        rows = [{"text": text} | ({} if other == "gone" else {"meta": other}) for text in texts]
        WRITERS[kind](tmp_path / f"{name}.{kind}", rows)
    assert tokens_of(tmp_path) == expected(TEXTS)


@pytest.mark.parametrize("noise", [10, 6_000_000])
def test_other_columns_may_change_within_a_file(tmp_path, noise):
    """Other columns may appear, disappear and change their type, within a part of the file and between parts."""
    others = [None, 1, "x", [1], {"a": None}, {"a": {"b": 1}}, {"c": [{}]}, [["x"], 1], "gone", True, 2**70]
    rows = []
    for i, text in enumerate(TEXTS):
        other = others[i % len(others)] if i >= 18 or noise == 10 else None
        rows.append({"text": text} | ({} if other == "gone" else {"meta": other}) | {"noise": "x" * 10})
    for i in (5, 17, 30):
        rows[i]["noise"] = "x" * noise
    assert tokens_of(write_lines(tmp_path / "a.jsonl", rows)) == expected(TEXTS)


def test_documents_without_text(tmp_path):
    """Documents without text are skipped, even if the first file has no others."""
    write_lines(tmp_path / "a.jsonl", [{"text": None, "id": i} for i in range(3)])
    write_lines(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS])
    write_lines(tmp_path / "c.jsonl", [{"id": 1}])
    assert tokens_of(tmp_path) == expected(TEXTS)


@pytest.mark.parametrize("value", [0, False, {}])
def test_empty_values_of_another_type_are_bad_documents(tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS] + [{"text": value}])
    assert "document 41 of" in error_of(path)


def test_invalid_utf8_in_an_object_of_several_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": "a"}\n{\n "text": "b",\n "x": "\xff"\n}\n')
    assert re.search(r"document 2 of .*utf-8 invalid start byte: line 4", error_of(tmp_path / "a.json"))


def test_half_of_a_surrogate_pair_is_a_bad_document(tmp_path):
    """It is neither dropped, nor are the documents after it."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*lines[:5], r'{"text": "ab\ud83dcd"}', r'{"text": "\ud83d\ud83d\ude00"}', *lines[5:]]))
    assert re.search(r"document 6 of .*not valid Unicode.*ud83dcd", error_of(path))
    assert tokens_of(path, bad_documents="skip") == expected(TEXTS)


@pytest.mark.parametrize("kind", [*WRITERS, "csv"])
def test_a_file_without_the_column_is_reported_once(tmp_path, capsys, kind):
    """A file that lacks the column is reported once, however many epochs read it; nulls in the column are not."""
    files = {
        "a": [{"text": text} for text in TEXTS],
        "b": [{"content": text} for text in TEXTS],
        "c": [{"text": None, "id": 1}],
        "d": [{"id": 1, "text": text} for text in TEXTS],
    }
    for name, rows in files.items():
        path = tmp_path / f"{name}.{kind}"
        if kind == "csv":
            pandas.DataFrame(rows).to_csv(path, index=False)
        else:
            WRITERS[kind](path, rows)
    assert tokens_of(tmp_path) == expected(TEXTS * 2)
    capsys.readouterr()
    tokens_of(tmp_path, num_epochs=3)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "no column" in line)
    assert line.endswith(f"b.{kind} has no column 'text' and is skipped")


def test_a_column_of_another_type_in_a_later_file(tmp_path, chat_tokenizer):
    """The error about a column that cannot be cast names the file and both types."""
    for name, chat in (("a", [{"role": "user", "content": "x"}]), ("b", [{"from": "human", "value": 1}])):
        WRITERS["parquet"](tmp_path / f"{name}.parquet", [{"messages": chat}] * 30)
    message = error_of(tmp_path, chat_tokenizer, dataset_column="messages")
    assert "b.parquet and later documents cannot be read: Couldn't cast array of type" in message
    assert re.search(r"struct<from: .*> to \{.role.: Value", message)


@pytest.mark.parametrize("value", [{"a": "x" * 1000}, [1, "x" * 1000], ["x" * 1000]])
def test_bad_documents_are_quoted_in_brief(tmp_path, value):
    """The error about a bad document quotes only its beginning."""
    path = write_lines(tmp_path / "a.jsonl", [{"content": text} for text in TEXTS] + [{"content": value}])
    message = error_of(path, dataset_column="content")
    assert "document 41 of" in message and "x" * 50 in message and "x" * 101 not in message


@pytest.mark.parametrize("later", [False, True])
def test_a_number_in_a_text_column(tmp_path, later):
    """A number among the texts is an error that names its document; it does not turn other texts into JSON."""
    rows = [{"text": text, "noise": "x" * (11_000_000 if later and i == 30 else 1)} for i, text in enumerate(TEXTS)]
    rows[35]["text"] = 5
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert "document 36 of" in error_of(path)
    assert tokens_of(path, bad_documents="skip") == expected(TEXTS[:35] + TEXTS[36:])


# Splits


LAYOUTS = [
    ["train-0.jsonl", "test-0.jsonl"],
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/extra-00000-of-00001.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "valid/c.jsonl", "eval/d.jsonl"],
    ["my_training.set.jsonl", "dev.jsonl", "training_test.jsonl"],
    ["b.jsonl", "a.jsonl", "deeper/c.jsonl", "trainer.jsonl"],
    [".hidden/x.jsonl", "__pycache__/y.jsonl", ".z.jsonl", "a.jsonl"],
    ["test.jsonl", "other.jsonl"],
    ["a/validation/b.jsonl", "a/train/b.jsonl"],
]


@pytest.mark.parametrize("odd_name", ["folder", "train [1]"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_files_are_assigned_to_splits_as_datasets_does_it(tmp_path, layout, odd_name):
    """Each split has the files that `datasets` itself finds for it; an unknown split is an error."""
    texts = {name: TEXTS[i * 4 : i * 4 + 4] for i, name in enumerate(layout)}
    for name in layout:
        write_lines(tmp_path / odd_name / name, [{"text": text} for text in texts[name]])
    (tmp_path / odd_name / "README.md").write_text("train and test")
    (tmp_path / odd_name).rename(tmp_path / "plain")
    splits = datasets.load_dataset_builder(str(tmp_path / "plain")).config.data_files
    found = {
        str(split): {Path(file).relative_to(tmp_path / "plain").as_posix() for file in files}
        for split, files in splits.items()
    }
    (tmp_path / "plain").rename(tmp_path / odd_name)
    assert found
    for split, names in found.items():
        in_order = sorted(names, key=lambda name: Path(name).parts)
        documents = [text for name in in_order for text in texts[name]]
        assert tokens_of(tmp_path / odd_name, dataset_split=split, eval_tokens=16) == expected(documents)
    message = error_of(tmp_path / odd_name, dataset_split="nonsense")
    assert f"has no split 'nonsense': it has {', '.join(found)}" in message


def test_files_of_no_split_are_reported(tmp_path, capsys):
    """Files that belong to no split are counted and one is named, also in the error about a missing split."""
    for name in ("alpha.txt", "beta.txt", "train-notes.txt"):
        (tmp_path / name).write_text("".join(TEXTS))
    note = "2 of its 3 files belong to no split, such as alpha.txt"
    assert tokens_of(tmp_path) == expected(["".join(TEXTS)])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "no split" in line)
    assert line.endswith(note)
    assert error_of(tmp_path, dataset_split="x").endswith(f"has no split 'x': it has train; {note}")
    (tmp_path / "train-notes.txt").unlink()
    tokens_of(tmp_path)
    assert "no split" not in capsys.readouterr().err


def test_one_file_and_one_saved_dataset_are_the_split_train(tmp_path):
    """Another split of them is an error in one line; the name of a single file has no meaning."""
    path = write_lines(tmp_path / "test-0.jsonl", [{"text": text} for text in TEXTS])
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"text": TEXTS}, split="validation").save_to_disk(tmp_path / "validation")
    for data in (path, tmp_path / "saved"):
        assert tokens_of(data) == expected(TEXTS)
        assert error_of(data, dataset_split="test").endswith("has no split 'test': it has train")
    for split in ("train", "validation"):
        assert tokens_of(tmp_path / "validation", dataset_split=split) == expected(TEXTS)
    assert error_of(tmp_path / "validation", dataset_split="x").endswith("has no split 'x': it has validation")


# Columns


@pytest.mark.fast
def test_a_column_of_another_name(tmp_path):
    """dataset_column names a column of text or tokens; the error about a missing column lists the existing ones."""
    ids = make_tokenizer()(TEXTS[::-1], add_special_tokens=False)["input_ids"]
    path = write_lines(tmp_path / "a.jsonl", [{"content": text, "ids": i} for text, i in zip(TEXTS, ids)])
    (tmp_path / "csv").mkdir()
    pandas.DataFrame({"prompt": TEXTS + ODD}).to_csv(tmp_path / "csv" / "a.csv", index=False)
    datasets.Dataset.from_dict({"content": TEXTS}).save_to_disk(tmp_path / "saved")
    assert tokens_of(path, dataset_column="content") == expected(TEXTS)
    assert tokens_of(path, dataset_column="ids") == expected(TEXTS[::-1])
    assert tokens_of(tmp_path / "csv", dataset_column="prompt") == expected(TEXTS + ODD)
    assert tokens_of(tmp_path / "saved", dataset_column="content") == expected(TEXTS)
    message = error_of(path)
    assert "has none of the columns tokens, input_ids, text: it has content, ids (set dataset_column" in message
    assert error_of(path, dataset_column="body").endswith("has no column 'body': it has content, ids")
    write_lines(path, [{"content": 5}] * 9)
    message = error_of(path, dataset_column="content")
    assert "has 5 of type int in column 'content'; it must be a string, a list" in message


@pytest.mark.parametrize("saved", [False, True])
def test_tokens_and_text_side_by_side(tmp_path, capsys, saved):
    """The tokens are read, which is reported; dataset_column=text reads the text."""
    ids = make_tokenizer()(TEXTS[::-1], add_special_tokens=False)["input_ids"]
    if saved:
        path = tmp_path
        datasets.Dataset.from_dict({"text": TEXTS, "tokens": ids}).save_to_disk(path)
    else:
        path = write_lines(tmp_path / "a.jsonl", [{"text": text, "tokens": i} for text, i in zip(TEXTS, ids)])
    assert tokens_of(path) == expected(TEXTS[::-1])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "columns" in line)
    assert "has the columns tokens, text: reading tokens (set dataset_column for another)" in line
    assert tokens_of(path, dataset_column="text") == expected(TEXTS)
    assert "columns" not in capsys.readouterr().err


# Chats


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots\nhere') }}{% endif %}"
    "<|endoftext|>{{ m.role }}{% if 'tools' in m %} with {{ m.tools }}{% endif %}: "
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}."}]
    + ([{"role": "user", "content": "Thanks", "tools": f"a calculator {i}"}] if i % 3 == 1 else [])
    for i in range(30)
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "In parts"}]}, {"role": "assistant", "content": "Yes."}]


def rendered(chats: list) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer.apply_chat_template(chats, tokenize=False)


def chat_tokens(chats: list) -> list[int]:
    """The expected tokens of chats: the template's BOS is the document's BOS."""
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    tokens = [token for text in rendered(chats) for token in tokenizer.encode(text, add_special_tokens=False).ids]
    return tokens[: len(tokens) // SEQ_LEN * SEQ_LEN]


@pytest.fixture
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved"])
def test_chats_go_through_the_chat_template(tmp_path, chat_tokenizer, kind):
    """A column of messages, whose keys may differ, gives the tokens of the template, with one BOS."""
    path, chats = tmp_path / f"a.{kind}", CHATS
    rows = [{"id": i, "messages": chat} for i, chat in enumerate(chats)]
    if kind in ("jsonl", "json"):
        chats = [*CHATS, PARTS]
        rows = [{"messages": chat} for chat in chats]
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        WRITERS[kind](path, rows)
    assert tokens_of(path, chat_tokenizer, dataset_column="messages") == chat_tokens(chats)


def test_chats_without_a_template(tmp_path):
    """A tokenizer without a chat template is an error in one line, whatever bad_documents is."""
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    for bad_documents in ("stop", "skip"):
        message = error_of(path, dataset_column="messages", bad_documents=bad_documents)
        assert "messages" in message and message.endswith(f"the tokenizer of {DEMO_LM} has no chat template")


@pytest.mark.parametrize(
    "bad, what",
    [
        ([{"role": "robot", "content": "x"}], "does not fit the tokenizer's chat template: no robots"),
        ([{"from": "human", "value": "x"}], "has a message without a role in column 'messages'"),
    ],
)
@pytest.mark.fast
def test_bad_chats(tmp_path, chat_tokenizer, capsys, bad, what):
    """A chat that the template rejects, or that is invalid, is named; with bad_documents=skip the others are read."""
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat} for chat in [*CHATS[:20], bad, *CHATS[20:]]])
    message = error_of(path, chat_tokenizer, dataset_column="messages")
    assert "document 21 of " in message and what in message
    tokens = tokens_of(path, chat_tokenizer, dataset_column="messages", bad_documents="skip")
    assert tokens == chat_tokens(CHATS) and what in capsys.readouterr().err


# Tokens outside the vocabulary, and special tokens


def with_token(token: str, **options) -> AutoTokenizer:
    """A tokenizer with one token outside the model's vocabulary, with id 4096."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(options or {"pad_token": token})
    assert tokenizer.convert_tokens_to_ids(token) == 4096
    return tokenizer


def test_tokens_outside_the_vocabulary(tmp_path, capsys):
    """A document with an added token is named, with the token and its id, or skipped."""
    texts = [*TEXTS[:35], "x [PAD] y", *TEXTS[35:]]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    message = error_of(path, with_token("[PAD]"))
    assert "document 36 of " in message and "'[PAD]'" in message and "id 4096" in message and "0 to 4095" in message
    assert tokens_of(path, with_token("[PAD]"), bad_documents="skip") == expected(TEXTS)
    assert "document 36 of " in capsys.readouterr().err


def test_a_bos_outside_the_vocabulary(tmp_path):
    """It would begin every document, so it is an error in one line that names it."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    message = error_of(path, with_token("[BOS]", bos_token="[BOS]"), bad_documents="skip")
    assert "BOS token '[BOS]'" in message and "id 4096" in message and "0 to 4095" in message


def test_special_tokens_in_the_text(tmp_path):
    """<|endoftext|> in a text is the special token; at the beginning it is the document's BOS."""
    texts = ["<|endoftext|>a = 1", "b<|endoftext|>c", *TEXTS]
    tokens = tokens_of(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    encode = make_tokenizer().convert_tokens_to_ids
    assert tokens[: tokens.index(encode("c")) + 1].count(BOS) == 3
    assert tokens == expected(["a = 1", "b", "c", *TEXTS])


# Many files


def test_many_small_files(tmp_path):
    """The tokenizer gets documents of several files in one call, each file has its own position, and the cost per file
    does not grow with their number."""
    costs = []
    for count in (64, 512):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:04}.txt").write_text(TEXTS[i % len(TEXTS)])
        reader = stream_of(folder).reader
        calls, tokenizer = [], reader.tokenizer
        reader.tokenizer = lambda texts, calls=calls, of=tokenizer, **options: (
            calls.append(len(texts)) or of(texts, **options)
        )
        profile = cProfile.Profile()
        chunks = profile.runcall(lambda reader=reader: list(reader.token_chunks(reader.beginning)))
        costs.append(pstats.Stats(profile).total_calls / count)
        assert calls == [32] * (count // 32)
        assert [position["shard"] for position, _ in chunks[:-1]] == list(range(count))
        assert all(position["row"] == position["skip"] == 0 for position, _ in chunks[:-1])
    assert costs[1] < 1.3 * costs[0]
