"""What the text stream does about faults: a hub that errs, cuts, stalls or goes down, damaged files, odd documents.

All of it goes through the real libraries. The hub's tests run the program in a process of its own (see test_hub.py).
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas
import pytest
import torch
from hub_server import Answer, Hub
from test_activation_store import (  # noqa: F401 (fixtures)
    BOS,
    DEMO_LM,
    SEQ_LEN,
    all_contexts,
    jsonl,
    make_cfg,
    model,
    reference_contexts,
)
from test_hub import LM, ONE_SMALL_RUN, ROOT
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from config import InputError
from text_stream import TextStream

# The hub's client tries six times itself, for 23 seconds. Here it tries twice, so that faults come through to the
# stream, and soon.
IMPATIENT = """
import inspect, runpy
from huggingface_hub.utils import _http
for function in (_http.http_backoff, _http.http_stream_backoff):
    inspect.unwrap(function).__kwdefaults__.update(max_retries=1, base_wait_time=0.1)
"""
BATCHES = """
import hashlib, json, sys
import text_stream
from activation_store import ActivationsStore
from config import get_default_cfg, post_init_cfg
from language_model import load_model
text_stream.LONGEST_PAUSE = 0.1
cfg = post_init_cfg(get_default_cfg() | json.loads(sys.argv[1]))
store = ActivationsStore(load_model(cfg), cfg)
print(store.fingerprint())
for _ in range(cfg["num_tokens"] // cfg["batch_size"]):
    print(hashlib.sha256(store.next_batch().numpy().tobytes()).hexdigest())
"""
MAIN = "runpy.run_path('main.py', run_name='__main__')"  # what `python main.py` runs
OPENED_AGAIN = re.compile(r"someone/\w+ broke off \(.+\): opening it again in (\S+) s, try (\d+) of (\d+)")
NUM_FILES, ROWS = 3, 400  # some 42,000 tokens


# A hub with faults


FAULTS = ("500", "503", "520", "cut", "hang up", "stall")  # 520: the hub's client does not try that again


class FaultyHub(Hub):
    """A hub that does `fault(path)` to each request for a dataset's data file: one of FAULTS, "gone", or None.

    `faults` lists what was done.
    """

    def __init__(self, repos: dict, fault):
        super().__init__(repos)
        self.fault, self.faults, self.lock = fault, [], threading.Lock()

    def send(self, request, answer: Answer) -> None:
        fault = None
        if "/resolve/" in request.path and request.path.endswith((".parquet", ".jsonl")):
            with self.lock:
                fault = self.fault(request.path)
                self.faults.append(fault)
        if fault is None:
            return super().send(request, answer)
        if fault.isdigit():
            return super().send(request, (int(fault), {"Content-Length": "0"}, b""))
        if fault == "cut":
            status, headers, body = answer
            super().send(request, (status, headers, body[: len(body) // 2]))  # the Content-Length says more
        if fault == "stall":
            time.sleep(2)  # HF_HUB_DOWNLOAD_TIMEOUT is 1
        if fault == "gone":  # nobody listens at the hub's port any more
            self.shutdown()
            self.server_close()
        request.close_connection = True


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict:
    """A model, and the same documents as parquet files of several row groups, and as JSON lines.

    A jsonl file is made so large, by a column of noise, that it is read by several requests, and its documents in
    several parts. (All that is asked of a small parquet file comes by one request, after two for its index.)
    """
    folder, rng = tmp_path_factory.mktemp("repos"), random.Random(0)
    (folder / "parquet").mkdir()
    (folder / "jsonl").mkdir()
    for file in range(NUM_FILES):
        texts = [f"def f_{file}_{i}(x):\n" + f"    x += {i}\n" * rng.randint(1, 8) for i in range(ROWS)]
        data = pandas.DataFrame({"text": texts})
        data.to_parquet(folder / "parquet" / f"{file}.parquet", row_group_size=100)
        data["noise"] = [rng.randbytes(12_000).hex() for _ in texts]
        data.to_json(folder / "jsonl" / f"{file}.jsonl", orient="records", lines=True)
    repos = {f"datasets/someone/{kind}": {"main": folder / kind} for kind in ("parquet", "jsonl")}
    return {"models/demo/lm": {"main": LM}} | repos


def run_python(folder: Path, hub: Hub, script: str, *arguments) -> subprocess.CompletedProcess:
    """A script in the repo's root, with `hub` for its hub and an empty cache in `folder`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_HOME": str(folder / "cache"), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = [sys.executable, "-c", IMPATIENT + script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def batches(folder: Path, hub: Hub, dataset: str, **changes) -> tuple[list[str], str]:
    """Hashes of the held-out contexts and of all batches that a hub's dataset gives, and the lines on stderr."""
    cfg = make_cfg(model_name="demo/lm", dataset_path=dataset, num_tokens=40_000, batch_size=400, **changes)
    keys = {key: value for key, value in cfg.items() if key not in ("name", "hook_point")}
    process = run_python(folder, hub, BATCHES, json.dumps(keys))
    assert process.returncode == 0, process.stderr
    return process.stdout.split(), process.stderr


@pytest.fixture(scope="module")
def sound_batches(tmp_path_factory, repos) -> list[str]:
    with FaultyHub(repos, lambda path: None) as hub:
        hashes, told = batches(tmp_path_factory.mktemp("sound"), hub, "someone/parquet")
    assert len(set(hashes)) == 101 and not OPENED_AGAIN.search(told)
    assert any(f"{NUM_FILES - 1}.parquet" in request for request in hub.requests), "all files are read"
    return hashes


@pytest.mark.parametrize("kind, seed", [("parquet", 0), ("jsonl", 1)])
def test_a_hub_with_faults_gives_the_same_batches(tmp_path, repos, sound_batches, kind, seed):
    """Errors 500, 503 and 520, cut and refused connections and stalls, two of three requests: the stream is opened
    again where it was, lines say so, and every batch is bit-identical to that of a hub without faults."""
    # Each fault twice in a row, since the hub's client tries twice; then one request that is answered.
    order = random.Random(seed).sample(FAULTS, len(FAULTS))
    faults = itertools.cycle(itertools.chain.from_iterable((fault, fault, None) for fault in order))
    with FaultyHub(repos, lambda path: next(faults)) as hub:
        hashes, told = batches(tmp_path, hub, f"someone/{kind}", stream_retries=10)
    assert set(hub.faults) == {None, *FAULTS}, "every kind of fault came"
    assert len(OPENED_AGAIN.findall(told)) >= 3
    assert hashes == sound_batches


def test_no_retries_is_one_try(tmp_path, repos, sound_batches):
    """stream_retries = 0 reads a sound hub as any other value does."""
    with FaultyHub(repos, lambda path: None) as hub:
        assert batches(tmp_path, hub, "someone/parquet", stream_retries=0)[0] == sound_batches


class ClosedDoor(Hub):
    """A hub that hangs up on the first `count` requests about a dataset: what it holds, its revisions and folders."""

    count = 8

    def send(self, request, answer: Answer) -> None:
        if request.path.startswith("/api/datasets/") and self.count > 0:
            self.count -= 1
            request.close_connection = True
        else:
            super().send(request, answer)


def test_a_hub_that_hangs_up_while_the_dataset_is_opened(tmp_path, repos, sound_batches):
    """The dataset is opened again, after pauses that are told, and gives the same batches."""
    with ClosedDoor(repos) as hub:
        hashes, told = batches(tmp_path, hub, "someone/parquet")
    assert hub.count == 0 and OPENED_AGAIN.search(told)
    assert hashes == sound_batches


@pytest.mark.parametrize("fault", ["503", "gone"])
def test_a_hub_that_stays_down(tmp_path, repos, fault):
    """After stream_retries tries with growing pauses the program ends with code 3 and one line that names the dataset;
    there is a checkpoint and no result, and the same command goes on from it."""
    with FaultyHub(repos, lambda path: None if path.endswith(("0.parquet", "1.parquet")) else fault) as hub:
        overrides = ONE_SMALL_RUN | dict(
            model_name="demo/lm", dataset_path="someone/parquet", output_dir=tmp_path / "runs", num_tokens=200_000,
            batch_size=512, model_batch_size=8, num_batches_in_buffer=2, stream_retries=2,
        )  # fmt: skip
        process = run_python(tmp_path, hub, MAIN, "demo", *(f"{key}={value}" for key, value in overrides.items()))
    assert process.returncode == 3, process.stderr
    lines = process.stderr.splitlines()
    assert lines[-1].startswith("error: dataset_path = 'someone/parquet' cannot be read on at document 1 of ")
    assert sum(line.startswith("error:") for line in lines) == 1 and "Traceback" not in process.stderr
    assert OPENED_AGAIN.findall(process.stderr) == [("1", "1", "2"), ("2", "2", "2")]
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/*/config.json"))
    assert not (run / "result.json").exists()
    # The same command goes on where it stopped, once the hub is back.
    with FaultyHub(repos, lambda path: None) as hub:
        process = run_python(tmp_path, hub, MAIN, "demo", *(f"{key}={value}" for key, value in overrides.items()))
    assert (step := re.search(r"Going on after step (\d+)", process.stderr)) and int(step[1]) > 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] > int(step[1]) and [line["step"] for line in lines] == sorted({x["step"] for x in lines})


# Damaged files and odd documents


def stream(path: Path, **changes) -> TextStream:
    cfg = make_cfg(dataset_path=str(path), **changes)
    return TextStream(cfg, AutoTokenizer.from_pretrained(LM), 4096, SEQ_LEN, 3)


def tokens_of(documents: list) -> list[int]:
    """Plain reference: BOS and tokens of each document that has any, joined."""
    tokenizer = Tokenizer.from_file(str(LM / "tokenizer.json"))
    texts = [document for document in documents if document]
    return [token for text in texts for token in [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]]


def all_tokens(stream: TextStream) -> list[int]:
    """Held-out and other contexts, to the end."""
    parts = [stream.held_out]
    while len(part := stream.contexts(7)):
        parts.append(part)
    return torch.cat(parts).flatten().tolist()


@pytest.fixture
def three_files(tmp_path) -> tuple[dict[str, list[str]], Path]:
    """The documents of three files in a folder, by file name; the second file is damaged by the tests."""
    (tmp_path / "data").mkdir()
    names = ("a", "b", "c")
    return {name: [f"def {name}_{i}():\n    return {i}\n" * 5 for i in range(200)] for name in names}, tmp_path / "data"


def assert_stops_and_skips(folder: Path, sound: list[str], place: str, capsys) -> None:
    """With bad_documents "stop" one line names the place; with "skip" the line is told, and the sound text is read."""
    with pytest.raises(InputError) as caught:
        all_tokens(stream(folder))
    assert re.search(place, str(caught.value)) and "\n" not in str(caught.value)
    assert "bad_documents=skip" in str(caught.value)
    capsys.readouterr()
    expected = tokens_of(sound)
    assert all_tokens(stream(folder, bad_documents="skip")) == expected[: len(expected) // SEQ_LEN * SEQ_LEN]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "passed over" in line)
    assert re.search(place, line)


def test_a_damaged_jsonl_file(three_files, capsys):
    """A line that is no JSON: what was readable before it is read, the rest of its file is not, the next file is."""
    documents, folder = three_files
    noise = "x" * 100_000  # so that the file is read in several parts, of 10 MB each
    for name, texts in documents.items():
        lines = [json.dumps({"text": text, "noise": noise if name == "b" else ""}) for text in texts]
        if name == "b":
            lines[150] = "{damaged"
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    read_before = 0
    with pytest.raises(InputError) as caught:
        all_tokens(stream(folder))
    read_before = int(re.search(r"document (\d+) of .*b\.jsonl", str(caught.value))[1]) - 1
    assert 0 < read_before <= 150
    sound = documents["a"] + documents["b"][:read_before] + documents["c"]
    assert_stops_and_skips(folder, sound, rf"document {read_before + 1} of .*b\.jsonl on", capsys)


def test_a_damaged_parquet_file(three_files, capsys):
    """A parquet file cut off in the middle cannot be read at all: it is named, and the other files are read."""
    documents, folder = three_files
    for name, texts in documents.items():
        pandas.DataFrame({"text": texts}).to_parquet(folder / f"{name}.parquet", row_group_size=100)
    content = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(content[: len(content) // 2])
    assert_stops_and_skips(folder, documents["a"] + documents["c"], r"document 1 of .*b\.parquet on", capsys)


def test_a_document_that_is_none(tmp_path, capsys):
    """A token that the model does not know makes one document unusable: it is named by its number, the rest is read."""
    tokenizer = Tokenizer.from_file(str(LM / "tokenizer.json"))
    texts = [f"def f_{i}():\n    return {i}\n" * 3 for i in range(100)]
    tokens = [tokenizer.encode(text).ids for text in texts]
    tokens[70] = [5, 4096, 7]
    pandas.DataFrame({"tokens": tokens}).to_parquet(tmp_path / "data.parquet")
    place = r"document 71 of .*data\.parquet has in its tokens 4096"
    assert_stops_and_skips(tmp_path / "data.parquet", texts[:70] + texts[71:], place, capsys)


def test_odd_documents_are_fine(tmp_path):
    """Documents that are empty, missing, of one token and of 10 MB are read like any other."""
    long = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(270_000))
    assert len(long) > 10_000_000
    # The long one is not among the first, which are tokenized once more for the held-out tokens.
    documents = [*(["x", "", None, "import sys\n" * 30] * 20), long, "y", "", "import os\n" * 30]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found, expected = torch.tensor(all_tokens(stream(tmp_path / "data.jsonl"))), torch.tensor(tokens_of(documents))
    assert torch.equal(found, expected[: len(expected) // SEQ_LEN * SEQ_LEN])
