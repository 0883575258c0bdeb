"""The model and the dataset by hub name, with the real libraries, from a local hub (hub_server.py).

The libraries read HF_ENDPOINT when they are imported, so every test runs the program in a separate process.
"""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import hub_server
import huggingface_hub
import pandas
import pytest
from helpers import DEMO_LM, ONE_SMALL_RUN, empty_cache
from hub_server import Hub, commit_of

from console import InputError
from hub import hub_reachable

FIRST_WORDS = """
import json, sys
from dataset import load_text
from config import get_default_cfg
for keys in json.loads(sys.argv[1]):
    print(next(iter(load_text(get_default_cfg() | keys)[0]))["text"].split()[0])
"""
ALL_TEXTS = """
import json, sys
from dataset import load_text
from config import get_default_cfg
for name in json.loads(sys.argv[1]):
    print(*(row["text"].split()[0] for row in load_text(get_default_cfg() | {"dataset_path": name})[0]))
"""
RESUME = """
import json, os, sys, time
import datasets, torch
import training
from activation_store import ActivationsStore
from checkpoint import run_folder
from config import get_default_cfg, post_init_cfg
from console import InputError
from language_model import load_model
from main import DEMO_BASE
from sae import SAE_CLASSES
from hub import stay_offline_without_network
torch.set_num_threads(1)
sys.stdout.reconfigure(line_buffering=True)
cfg = post_init_cfg(get_default_cfg() | DEMO_BASE | json.loads(sys.argv[1]))
model = load_model(cfg)
batches = 0

def train(stop_after, **how):
    class Store(ActivationsStore):
        def next_batch(self):
            global batches
            batches += 1
            if batches > stop_after:
                raise training.Stopped
            return super().next_batch()
    global batches
    batches = 0
    store = Store(model, cfg)
    print(store.stream.reader.commit)
    try:
        training.train_sae_group([SAE_CLASSES[cfg["sae_type"]](cfg)], store, model, [cfg], **how)
    except (InputError, training.Stopped) as error:
        print(repr(error))
    else:
        print("finished")

def wait_for(file):
    print("waiting")
    while not os.path.exists(file):
        time.sleep(0.01)

train(2)
train(2)
wait_for(sys.argv[2])
train(2)
train(2, resume_anyway=True)
made_with = json.loads((run_folder(cfg) / "config.json").read_text())["_provenance"]
print([(part["dataset_commit"], part["after_step"]) for part in [*made_with["earlier"], made_with]])
datasets.load_dataset(cfg["dataset_path"])
wait_for(sys.argv[3])
stay_offline_without_network(cfg["dataset_path"])
train(2)
"""
CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: english/one.parquet}, {split: test, path: english/two.parquet}]
- config_name: de
  data_files: [{split: train, path: german/one.parquet}]
---
"""


def write_parquet(path: Path, word: str) -> Path:
    """Write about 20,000 tokens of text that begin with `word`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{word} = {i}\ndef function_{i}(x):\n    return x + {i}\n" * 20 for i in range(60)]
    pandas.DataFrame({"text": texts}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The contents of the hub's repositories, one folder per revision."""
    folder = tmp_path_factory.mktemp("hub")
    write_parquet(folder / "text" / "train.parquet", "text")
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text("raise SystemExit('somebody ran the loading script')")
    write_parquet(folder / "converted" / "plain_text" / "train" / "0000.parquet", "text")
    write_parquet(folder / "card" / "english" / "one.parquet", "english_train")
    write_parquet(folder / "card" / "english" / "two.parquet", "english_test")
    write_parquet(folder / "card" / "german" / "one.parquet", "german_train")
    (folder / "card" / "README.md").write_text(CARD)
    write_parquet(folder / "branch" / "train.parquet", "branch")
    for kind in ("jsonl", "parquet", "jsonl.gz"):  # other columns that appear and change their type
        (folder / f"others {kind}").mkdir()
        for name, columns in (("a", {"meta": [None, None]}), ("b", {"meta": ["x", "y"], "more": [1, 2]})):
            data = pandas.DataFrame({"text": [f"{name}1 = 1", f"{name}2 = 2"]} | columns)
            file = folder / f"others {kind}" / f"{name}.{kind}"
            data.to_parquet(file) if kind == "parquet" else data.to_json(file, orient="records", lines=True)
    return folder


@pytest.fixture
def hub(folder, program):
    repos = {
        "models/gpt2": "models/openai-community/gpt2",  # moved, as on the real hub
        "models/openai-community/gpt2": {"main": DEMO_LM},
        "models/someone/lm": {"main": DEMO_LM},
        "models/EleutherAI/pythia-70m": {"main": DEMO_LM},
        "datasets/someone/text": {"main": folder / "text"},
        "datasets/someone/script": {"main": folder / "script", "refs/convert/parquet": folder / "converted"},
        "datasets/someone/languages": {"main": folder / "card", "v2": folder / "branch"},
    } | {f"datasets/others/{kind}": {"main": folder / f"others {kind}"} for kind in ("jsonl", "parquet", "jsonl.gz")}
    with Hub(repos, program.port) as hub:
        yield hub


@pytest.fixture(scope="module")
def local_record(folder, program, tmp_path_factory) -> dict:
    """The record of a run on local files, to compare with the runs from the hub."""
    output_dir = tmp_path_factory.mktemp("local")
    with Hub({}, program.port) as hub:
        process = run_demo(output_dir, program, model_name=DEMO_LM, dataset_path=folder / "text" / "train.parquet")
    assert process.returncode == 0, process.stderr
    assert not hub.requests, "local files need no hub"
    return record(output_dir)


def run_python(program, *arguments) -> subprocess.CompletedProcess:
    """Run Python in the repository root, with an empty cache."""
    empty_cache(program)
    return program.run(*arguments, figures=False)


def run_demo(folder: Path, program, **overrides) -> subprocess.CompletedProcess:
    overrides = ONE_SMALL_RUN | {"output_dir": folder / "runs"} | overrides
    return run_python(program, "main.py", "demo", *(f"{key}={value}" for key, value in overrides.items()))


def record(folder: Path) -> dict:
    """Result and provenance of the one run in `folder`, without its duration."""
    (result,) = folder.glob("runs/*/*/result.json")
    made_with = json.loads((result.parent / "config.json").read_text())["_provenance"]
    # Specific to each run, to local files, to the hub.
    for key in ("wandb_id", "data_files_sha256", "dataset_commit"):
        made_with.pop(key)
    return json.loads(result.read_text()) | {"seconds": None, "made_with": made_with}


def first_words(program, *dataset_keys: dict) -> list[str]:
    """The first word of each of these datasets."""
    process = run_python(program, "-c", FIRST_WORDS, json.dumps(dataset_keys))
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_training_from_the_hub_equals_training_from_local_files(tmp_path, hub, program, local_record):
    """`gpt2-small` is the hub's gpt2, a hub dataset is streamed, and the run equals that on local files bit for bit."""
    process = run_demo(tmp_path, program, model_name="gpt2-small", dataset_path="someone/text")
    assert process.returncode == 0, process.stderr
    assert record(tmp_path) == local_record
    requests = "\n".join(hub.requests)
    assert "/gpt2/resolve/" in requests and "gpt2-small" not in requests
    assert not list(Path(program.env["HF_HOME"]).rglob("*.parquet")), "the dataset was downloaded, not streamed"


def test_a_short_name_of_transformer_lens(program, hub, folder):
    """Model and tokenizer are loaded from the hub by their name there."""
    code = """
import sys
from activation_store import ActivationsStore
from config import get_default_cfg, post_init_cfg
from language_model import load_model
from main import DEMO_BASE
cfg = get_default_cfg() | DEMO_BASE | {"model_name": "pythia-70m", "dataset_path": sys.argv[1], "device": "cpu"}
cfg = post_init_cfg(cfg | {"num_tokens": 1024, "batch_size": 256, "eval_tokens": 512})
print(ActivationsStore(load_model(cfg), cfg).next_batch().shape)
"""
    process = run_python(program, "-c", code, folder / "text" / "train.parquet")
    assert process.stdout == "torch.Size([256, 128])\n", process.stderr


def test_dataset_that_is_only_a_loading_script(tmp_path, hub, program, local_record):
    """For a dataset that is only a script, the hub's conversion to parquet is read, which is reported."""
    process = run_demo(tmp_path, program, model_name="someone/lm", dataset_path="someone/script")
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stderr.splitlines() if "refs/convert/parquet" in line)
    assert "someone/script is a loading script" in line
    assert record(tmp_path) == local_record


def wait_for_lines(process, file: Path, count: int) -> list[str]:
    """The lines of the file once `count` of them say that the process waits."""
    while file.read_text().splitlines().count("waiting") < count and process.poll() is None:
        time.sleep(0.01)
    return [line for line in file.read_text().splitlines() if line != "waiting"]


def test_a_dataset_that_changed_on_the_hub(tmp_path, folder, program, monkeypatch):
    """The recorded commit is the one that `datasets` resolved. A run resumes neither with another commit nor with the
    local cache, unless resume_anyway is set; its record then has both commits.
    """
    name = "datasets/someone/text"
    keys = ONE_SMALL_RUN | {"dataset_path": "someone/text", "output_dir": str(tmp_path / "runs")}
    old, new = commit_of(name, "main"), "5" * 40
    changed, gone, out, err = (tmp_path / file for file in ("changed", "gone", "out", "err"))
    empty_cache(program)
    with Hub({name: {"main": folder / "text"}}, program.port):
        process = program.start("-c", RESUME, json.dumps(keys), changed, gone, out=out, err=err)
        wait_for_lines(process, out, 1)
        monkeypatch.setattr(hub_server, "commit_of", lambda repo, revision: new)
        changed.touch()
        wait_for_lines(process, out, 2)
    gone.touch()
    process.wait(timeout=100)
    lines, err = wait_for_lines(process, out, 2), err.read_text()
    assert lines[:5] == [old, "Stopped()", old, "Stopped()", new], err
    assert f"dataset_commit was {old} and is {new} (--resume-anyway" in lines[5]
    assert lines[6:10] == [new, "Stopped()", str([(old, 0), (new, 4)]), "None"], err
    assert f"dataset_commit was {new} and is None (--resume-anyway" in lines[10]


@pytest.mark.parametrize("key", ["model_name", "dataset_path"])
def test_unknown_hub_name(tmp_path, hub, program, key):
    """A name that is not on the hub ends the program with code 2 and one line with the key and the name."""
    process = run_demo(
        tmp_path, program, **{"model_name": DEMO_LM, "dataset_path": "someone/text"} | {key: "someone/nothing"}
    )
    assert process.returncode == 2, process.stderr
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error:"))
    assert line == process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert f"{key} = 'someone/nothing'" in line and "Without a network" not in line


def test_dataset_keys_reach_the_hub(hub, program):
    """dataset_config, dataset_split and dataset_revision each select a part of a hub dataset."""
    languages = {"dataset_path": "someone/languages"}
    assert first_words(
        program,
        languages | {"dataset_config": "en"},
        languages | {"dataset_config": "de"},
        languages | {"dataset_config": "en", "dataset_split": "test"},
        languages | {"dataset_revision": "v2"},
    ) == ["english_train", "german_train", "english_test", "branch"]


def test_other_columns_do_not_matter(hub, program):
    """In a hub dataset too only one column is read; the other columns and their types may differ between files."""
    names = [f"others/{kind}" for kind in ("jsonl", "parquet", "jsonl.gz")]
    process = run_python(program, "-c", ALL_TEXTS, json.dumps(names))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["a1 a2 b1 b2"] * 3


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "", "https://", "http://x:abc", "http://[::1"])
def test_an_endpoint_that_is_no_url(endpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(InputError, match=f"HF_ENDPOINT = {re.escape(repr(endpoint))} is not a URL"):
        hub_reachable()


def test_a_proxy_is_assumed_to_work(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    assert not hub_reachable()
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert hub_reachable()
