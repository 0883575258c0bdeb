"""Faults in the text stream: a hub that fails, truncates, stalls or goes down, corrupt files, unusual documents.

All tests use the real libraries. The hub's tests run the program in separate processes (see test_hub.py).
"""

import gzip
import itertools
import json
import random
import re
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from helpers import BOS, DEMO_LM, ONE_SMALL_RUN, SEQ_LEN, empty_cache, stream_cfg
from hub_server import Answer, Hub
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import dataset
from console import InputError
from hub import is_transient
from text_stream import Prefetcher, TextStream

# By default the hub's client waits 1 and 2 s before its retries, and up to 10 s for an answer.
IMPATIENT = """
import inspect, runpy
from huggingface_hub import constants
from huggingface_hub.utils import _http
constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
for function in (_http.http_backoff, _http.http_stream_backoff):
    inspect.unwrap(function).__kwdefaults__["base_wait_time"] = 0.1
"""
BATCHES = """
import hashlib, json, sys
import text_stream
from activation_store import ActivationsStore
from config import get_default_cfg, post_init_cfg
from language_model import load_model
text_stream.MAX_BACKOFF = 0.1
model = None
for keys, resume_after in json.loads(sys.argv[1]):
    cfg = post_init_cfg(get_default_cfg() | keys)
    model = model or load_model(cfg)
    store = ActivationsStore(model, cfg)
    hashes = [store.fingerprint()]
    for i in range(cfg["num_tokens"] // cfg["batch_size"]):
        hashes.append(hashlib.sha256(store.next_batch().numpy().tobytes()).hexdigest())
        if i in resume_after:
            state = json.dumps(store.state_dict())
            store = ActivationsStore(model, cfg)
            store.load_state_dict(json.loads(state))
    print(*hashes)
"""
CONTEXTS = """
import json, sys
import text_stream
from transformers import AutoTokenizer
text_stream.MAX_BACKOFF, text_stream.PREFETCH_CHUNKS = 0.1, 1
cfg, resume_after = json.loads(sys.argv[1])
make_stream = lambda: text_stream.TextStream(cfg, AutoTokenizer.from_pretrained("demo/lm"), 4096)
stream = make_stream()
print(json.dumps(stream.held_out.flatten().tolist()))
for count in resume_after:
    print(json.dumps(stream.contexts(count).flatten().tolist()))
    state = json.dumps(stream.state_dict())
    stream = make_stream() if count % 2 else stream
    stream.load_state_dict(json.loads(state))
while len(part := stream.contexts(50)):
    print(json.dumps(part.flatten().tolist()))
"""
MAIN = "runpy.run_path('main.py', run_name='__main__')"  # what `python main.py` runs
RETRY = re.compile(r"reading someone/\w+ failed \(.+\): retry (\d+) of (\d+) in (\S+) s")
NUM_FILES, ROWS = 5, 240  # some 42,000 tokens


# A hub with faults


FAULTS = ("500", "503", "520", "cut", "short", "empty", "hang up", "stall")  # 520: not retried by the client


class FaultyHub(Hub):
    """A hub that applies `fault(path)` to each request for a dataset's data file: one of FAULTS, "gone", or None.

    `faults` lists the applied faults, `ranges` the requested bytes.
    """

    daemon_threads, block_on_close = True, False  # do not wait for stalled requests

    def __init__(self, repos: dict, port: int, fault):
        super().__init__(repos, port)
        self.fault, self.faults, self.ranges, self.lock = fault, [], [], threading.Lock()

    def send(self, request, answer: Answer) -> None:
        fault = None
        if "/resolve/" in request.path and request.path.endswith((".parquet", ".jsonl")):
            with self.lock:
                self.ranges.append(request.headers["Range"])
                fault = self.fault(request.path)
                self.faults.append(fault)
        if fault is None:
            return super().send(request, answer)
        if fault.isdigit():
            return super().send(request, (int(fault), {"Content-Length": "0"}, b""))
        if fault == "cut":
            status, headers, body = answer
            super().send(request, (status, headers, body[: len(body) // 2]))  # less than Content-Length
        if fault in ("short", "empty"):  # without a Content-Length the body ends with the connection
            status, headers, body = answer
            headers = {name: value for name, value in headers.items() if name != "Content-Length"}
            super().send(request, (status, headers, body[: len(body) // 2 if fault == "short" else 0]))
        if fault == "stall":
            time.sleep(2)  # HF_HUB_DOWNLOAD_TIMEOUT is 1
        if fault == "gone":  # nothing listens on the hub's port any more
            self.shutdown()
            self.server_close()
        request.close_connection = True


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict:
    """A model, and the same documents as parquet files of several row groups, as JSON lines, and as tokens.

    Another column makes two of the jsonl files so large that each takes two requests and three parts. (A small file
    takes one request.)
    """
    folder, rng = tmp_path_factory.mktemp("repos"), random.Random(0)
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    kinds = ("parquet", "jsonl", "tokens")
    for kind in kinds:
        (folder / kind).mkdir()
    for file in range(NUM_FILES):
        texts = [f"def f_{file}_{i}(x):\n" + f"    x += {i}\n" * rng.randint(1, 8) for i in range(ROWS)]
        data = pandas.DataFrame({"text": texts})
        data.to_parquet(folder / "parquet" / f"{file}.parquet", row_group_size=100)
        tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        pandas.DataFrame({"input_ids": tokens}).to_parquet(folder / "tokens" / f"{file}.parquet", row_group_size=100)
        data["noise"] = "x" * (100_000 if file in (1, 3) else 1)
        data.to_json(folder / "jsonl" / f"{file}.jsonl", orient="records", lines=True)
    repos = {f"datasets/someone/{kind}": {"main": folder / kind} for kind in kinds}
    return {"models/demo/lm": {"main": DEMO_LM}} | repos


def run_python(program, script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a script in the repository root, with an empty cache."""
    empty_cache(program)
    return program.run("-c", IMPATIENT + script, *arguments, figures=False)


def random_faults(seed: int, share: float):
    """Two or three of the same fault in a row: the hub's client sends a request three times, so some reach us."""
    rng = random.Random(seed)
    kinds = itertools.cycle(rng.sample(FAULTS, len(FAULTS)))
    while True:
        yield from [next(kinds)] * rng.randint(2, 3) if rng.random() < share else [None]


class HangingUpHub(FaultyHub):
    """A hub that also closes the connection on the first `count` requests for the metadata of one dataset."""

    count = 8

    def send(self, request, answer: Answer) -> None:
        if request.path.startswith("/api/datasets/someone/closed") and self.count > 0:
            self.count -= 1
            request.close_connection = True
        else:
            super().send(request, answer)


READINGS = {  # name of the dataset: what it holds, seed of its faults, how often a new store resumes, config
    "sound": ("parquet", None, 0, dict(stream_retries=0)),
    "parquet": ("parquet", 0, 0, dict(stream_retries=20)),
    "jsonl": ("jsonl", 1, 1, dict(stream_retries=20)),
    "tokens": ("tokens", 2, 3, dict(stream_retries=20)),
    "closed": ("parquet", None, 0, {}),
}


@pytest.fixture(scope="module")
def readings(program, repos) -> dict[str, SimpleNamespace]:
    """For each dataset, all read by one process: hashes of the held-out contexts and of all batches, the lines on
    stderr, the hub's faults, and the requested files. After some of the batches a new store resumes from the state of
    the old one."""
    faults = {name: random_faults(seed, 0.6) for name, (_, seed, *_) in READINGS.items() if seed is not None}
    found, requested = {name: SimpleNamespace(faults=[], files=set()) for name in READINGS}, []

    def fault(path: str) -> str | None:
        name, file = re.search(r"/someone/(\w+)/.*/([^/]+)$", path).groups()
        found[name].files.add(file)
        found[name].faults.append(next(faults[name]) if name in faults else None)
        return found[name].faults[-1]

    for name, (_, seed, resumes, changes) in READINGS.items():
        cfg = stream_cfg(
            model_name="demo/lm", dataset_path=f"someone/{name}", num_tokens=40_000, batch_size=400,
            model_batch_size=25, **changes,
        )  # fmt: skip
        keys = {key: value for key, value in cfg.items() if key not in ("name", "hook_point")}
        requested.append((keys, random.Random(seed).sample(range(100), resumes)))
    datasets = {f"datasets/someone/{name}": repos[f"datasets/someone/{kind}"] for name, (kind, *_) in READINGS.items()}
    with HangingUpHub(repos | datasets, program.port, fault) as hub:
        process = run_python(program, BATCHES, json.dumps(requested))
    assert process.returncode == 0, process.stderr
    assert hub.count == 0
    for name, line in zip(READINGS, process.stdout.splitlines(), strict=True):
        found[name].hashes = line.split()
        found[name].lines = "\n".join(line for line in process.stderr.splitlines() if f"someone/{name} " in line)
    return found


def test_a_hub_without_faults(readings):
    """All files are read without a retry, also with stream_retries = 0."""
    sound = readings["sound"]
    assert len(sound.hashes) == len(set(sound.hashes)) == 101 and not RETRY.search(sound.lines)
    assert sound.files == {f"{i}.parquet" for i in range(NUM_FILES)}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tokens"])
def test_a_hub_with_faults_gives_the_same_batches(readings, kind):
    """Random errors 500, 503 and 520, truncated and missing responses and stalls: the stream is reopened at the same
    position, retries are reported, and all batches are bit-identical to those of a hub without faults. This also holds
    for token columns and after resuming."""
    assert len(set(readings[kind].faults)) >= 6 and len(RETRY.findall(readings[kind].lines)) >= 3
    assert readings[kind].hashes == readings["sound"].hashes


def test_a_hub_that_hangs_up_while_the_dataset_is_opened(readings):
    """Opening is retried, the retries are reported, and the batches are the same."""
    assert RETRY.search(readings["closed"].lines)
    assert readings["closed"].hashes == readings["sound"].hashes


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Path:
    """A parquet file of 12 row groups and 72 MB; pyarrow requests about 32 MB at once."""
    file, rng = tmp_path_factory.mktemp("large") / "data.parquet", random.Random(0)
    texts = [f"def f_{i}(x):\n" + f"    x += {i}\n" * rng.randint(1, 8) for i in range(600)]
    data = pandas.DataFrame({"text": texts, "noise": [rng.randbytes(120_000) for _ in texts]})
    data.to_parquet(file, row_group_size=50, compression=None)
    return file


def test_faults_within_a_large_file(program, repos, large_file):
    """Faults, up to three in a row, at random requests for parts of one large file, and states saved and loaded within
    it, in the same stream and in a new one. The tokens equal those of the local file."""
    rng = random.Random(0)
    faults = random_faults(2, 0.4)
    cfg = stream_cfg(dataset_path="someone/large", stream_retries=20)
    resume_after = [rng.randint(1, 300) for _ in range(3)]

    def fault(path: str) -> str | None:
        """Each part after the first is truncated until the stream is reopened; other requests fail at random."""
        part = hub.ranges[-1]
        later = not part.startswith("bytes=4-") and part != hub.ranges[0]  # the first request is for the index
        return "cut" if later and hub.ranges.count(part) <= 3 else next(faults)

    with FaultyHub(repos | {"datasets/someone/large": {"main": large_file.parent}}, program.port, fault) as hub:
        process = run_python(program, CONTEXTS, json.dumps([cfg, resume_after]))
    assert process.returncode == 0, process.stderr
    found = [token for line in process.stdout.splitlines() for token in json.loads(line)]
    assert found == all_tokens(stream(large_file))
    assert len(RETRY.findall(process.stderr)) >= 2 and len(set(hub.faults)) >= 5
    assert len(set(hub.ranges)) >= 4, "the index and three parts"


@pytest.mark.parametrize("fault", ["504", "gone"])
def test_a_hub_that_stays_down(tmp_path, program, repos, fault):
    """After stream_retries retries with backoff, of three requests each, the program exits with code 3 and one line
    that names the dataset. There is a checkpoint and no result, and the same command resumes from it."""
    read = ("0.parquet", "1.parquet")
    with FaultyHub(repos, program.port, lambda path: None if path.endswith(read) else fault) as hub:
        overrides = ONE_SMALL_RUN | dict(
            model_name="demo/lm", dataset_path="someone/parquet", output_dir=tmp_path / "runs", num_tokens=200_000,
            batch_size=512, model_batch_size=8, num_batches_in_buffer=2, stream_retries=2,
        )  # fmt: skip
        process = run_python(program, MAIN, "demo", *(f"{key}={value}" for key, value in overrides.items()))
    assert process.returncode == 3, process.stderr
    lines = process.stderr.splitlines()
    assert lines[-1].startswith("error: dataset_path = 'someone/parquet' cannot be read at document 1 of ")
    assert sum(line.startswith("error:") for line in lines) == 1 and "Traceback" not in process.stderr
    assert RETRY.findall(process.stderr) == [("1", "2", "1"), ("2", "2", "2")]
    assert hub.faults.count(fault) == (1 if fault == "gone" else 3 * (1 + overrides["stream_retries"]))
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/*/config.json"))
    assert not (run / "result.json").exists()
    # Once the hub is back, the same command resumes.
    with FaultyHub(repos, program.port, lambda path: None):
        process = run_python(program, MAIN, "demo", *(f"{key}={value}" for key, value in overrides.items()))
    assert (step := re.search(r"Resuming after step (\d+)", process.stderr)) and int(step[1]) > 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] > int(step[1]) and [line["step"] for line in lines] == sorted({x["step"] for x in lines})


class SilentHub(Hub):
    """A hub that accepts every request for a repository and never responds."""

    daemon_threads, block_on_close = True, False

    def send(self, request, answer: Answer) -> None:
        threading.Event().wait()


@pytest.mark.parametrize("key", ["model_name", "dataset_path"])
def test_a_hub_that_never_answers(tmp_path, program, repos, key):
    """The program soon exits with code 3 and a line that names the model or dataset."""
    overrides = ONE_SMALL_RUN | {"model_name": DEMO_LM, "output_dir": tmp_path / "runs", "stream_retries": 1}
    overrides |= {key: "someone/lm"}
    with SilentHub(repos, program.port) as hub:
        process = run_python(program, MAIN, "demo", *(f"{name}={value}" for name, value in overrides.items()))
    assert process.returncode == 3, process.stderr
    assert re.search(rf"^error: {key} = .* cannot be (loaded|opened): ", process.stderr, re.M)
    assert len(hub.requests) < 20


# Corrupt files and unusual documents


def stream(path: Path, **changes) -> TextStream:
    cfg = stream_cfg(dataset_path=str(path), **changes)
    return TextStream(cfg, AutoTokenizer.from_pretrained(DEMO_LM), 4096)


def tokens_of(documents: list) -> list[int]:
    """Reference: BOS and tokens of each document that is not empty, concatenated."""
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    texts = [document for document in documents if document]
    return [token for text in texts for token in [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]]


def all_tokens(stream: TextStream) -> list[int]:
    """The tokens of all contexts, held-out ones first."""
    parts = [stream.held_out]
    while len(part := stream.contexts(7)):
        parts.append(part)
    return torch.cat(parts).flatten().tolist()


@pytest.fixture
def three_files(tmp_path) -> tuple[dict[str, list[str]], Path]:
    """The documents of three files in a folder, by file name. The tests make the second file corrupt."""
    (tmp_path / "data").mkdir()
    names = ("a", "b", "c")
    return {name: [f"def {name}_{i}():\n    return {i}\n" * 5 for i in range(200)] for name in names}, tmp_path / "data"


def assert_stops_and_skips(folder: Path, valid: list[str], place: str, capsys) -> None:
    """bad_documents "stop" raises an error that names the place; "skip" reports the place and reads the valid text."""
    with pytest.raises(InputError) as caught:
        all_tokens(stream(folder))
    assert re.search(place, str(caught.value)) and "\n" not in str(caught.value)
    assert "bad_documents=skip" in str(caught.value)
    capsys.readouterr()
    expected = tokens_of(valid)
    assert all_tokens(stream(folder, bad_documents="skip")) == expected[: len(expected) // SEQ_LEN * SEQ_LEN]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert re.search(place, line)


def test_a_corrupt_jsonl_file(three_files, capsys):
    """At a line that is not JSON, the rest of its file is skipped. The readable text before it and the next file are
    read."""
    documents, folder = three_files
    noise = "x" * 100_000  # so that the file is read in several parts, of 10 MB each
    for name, texts in documents.items():
        lines = [json.dumps({"text": text, "noise": noise if name == "b" else ""}) for text in texts]
        if name == "b":
            lines[150] = "{corrupt"
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        all_tokens(stream(folder))
    read_before = int(re.search(r"document (\d+) of .*b\.jsonl", str(caught.value))[1]) - 1
    assert read_before == 150
    valid = documents["a"] + documents["b"][:read_before] + documents["c"]
    assert_stops_and_skips(folder, valid, rf"document {read_before + 1} of .*b\.jsonl and later documents", capsys)


def test_the_first_jsonl_file_is_corrupt(three_files, capsys):
    """The columns are read from the next file."""
    documents, folder = three_files
    for name, texts in documents.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(["{corrupt"] if name == "a" else lines) + "\n")
    valid = documents["b"] + documents["c"]
    assert_stops_and_skips(folder, valid, r"document 1 of .*a\.jsonl and later documents", capsys)


def test_a_hub_that_fails_after_a_corrupt_first_file(three_files, monkeypatch):
    """While the columns are looked for. This is no fault of the first file, and a retry may succeed."""
    documents, folder = three_files
    for name in documents:
        (folder / f"{name}.jsonl").write_text("{corrupt" if name == "a" else '{"text": "x"}')
    real = dataset.json_parts

    def json_parts(file, size):
        if file.endswith("b.jsonl"):
            raise ConnectionError("reset")
        return real(file, size)

    monkeypatch.setattr(dataset, "json_parts", json_parts)
    with pytest.raises(InputError, match="cannot be read: reset") as caught:
        dataset.load_text(stream_cfg(dataset_path=str(folder)))
    assert is_transient(caught.value)


DAMAGED = {
    "no gzip": b"no gzip",
    "wrong bytes": gzip.compress(b"{" * 999)[:-9] + b"x" * 9,
    "deep nesting": gzip.compress(b"[" * 99999),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_first_compressed_jsonl_file_is_corrupt(three_files, capsys, damage):
    documents, folder = three_files
    for name, texts in documents.items():
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / f"{name}.jsonl.gz").write_bytes(DAMAGED[damage] if name == "a" else gzip.compress(lines.encode()))
    valid = documents["b"] + documents["c"]
    assert_stops_and_skips(folder, valid, r"document 1 of .*a\.jsonl\.gz and later documents", capsys)


def test_a_thread_that_dies_is_an_error():
    """Also of what is no Exception, as a panic in Rust."""

    class Panic(BaseException):
        pass

    def items():
        yield 1
        raise Panic

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 1
    with pytest.raises(Panic):
        next(prefetcher)


def test_a_corrupt_parquet_file(three_files, capsys):
    """A truncated parquet file cannot be read at all: it is named, and the other files are read."""
    documents, folder = three_files
    for name, texts in documents.items():
        pandas.DataFrame({"text": texts}).to_parquet(folder / f"{name}.parquet", row_group_size=100)
    content = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(content[: len(content) // 2])
    valid = documents["a"] + documents["c"]
    assert_stops_and_skips(folder, valid, r"document 1 of .*b\.parquet and later documents", capsys)


def test_a_document_with_an_unknown_token(tmp_path, capsys):
    """A token outside the vocabulary makes its document invalid: it is named by its number, the others are read."""
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    texts = [f"def f_{i}():\n    return {i}\n" * 3 for i in range(100)]
    tokens = [tokenizer.encode(text).ids for text in texts]
    tokens[70] = [5, 4096, 7]
    pandas.DataFrame({"tokens": tokens}).to_parquet(tmp_path / "data.parquet")
    place = r"document 71 of .*data\.parquet has 4096 in column 'tokens'"
    assert_stops_and_skips(tmp_path / "data.parquet", texts[:70] + texts[71:], place, capsys)


def test_unusual_documents(tmp_path):
    """Documents that are empty, missing, of one token or of 10 MB are read like any other."""
    long = "".join(f"# {i} {'-' * 76}\n" for i in range(120_000))  # few tokens for its length
    assert len(long) > 10_000_000
    # The long one is not among the first documents, which are tokenized twice because of the held-out tokens.
    documents = [*(["x", "", None, "import sys\n" * 30] * 20), long, "y", "", "import os\n" * 30]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found, expected = torch.tensor(all_tokens(stream(tmp_path / "data.jsonl"))), torch.tensor(tokens_of(documents))
    assert torch.equal(found, expected[: len(expected) // SEQ_LEN * SEQ_LEN])
