"""The repo is flat modules: make them importable from the tests. And the fixtures that several test files use."""

import inspect
import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("helpers")

# Fixtures import torch and the project when they are built: only in the processes that run tests.


def pytest_collectstart():
    """Before a test file is imported: kernels run on CPU tensors if this is set before Triton is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


# These files take longest. They are begun first, so that both processes end at about the same time.
SLOWEST = ["test_resume", "test_stream_faults", "test_triton_ops", "test_main", "test_results", "test_readme"]
SLOWEST += ["test_distributed", "test_wandb", "test_plan", "test_sparse_ops"]


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share between threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Streams of text and activations


@pytest.fixture(scope="module")
def model():
    """The demo's language model."""
    from helpers import DEMO_LM

    from config import get_default_cfg
    from language_model import load_model

    return load_model(get_default_cfg() | {"model_name": str(DEMO_LM), "device": "cpu"})


@pytest.fixture(scope="module")
def hf_model():
    """The same in transformers alone."""
    import transformers
    from helpers import DEMO_LM

    return transformers.GPT2LMHeadModel.from_pretrained(DEMO_LM, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Functions from the standard library, an empty document and a non-ASCII one."""
    functions = [inspect.getsource(value) for _, value in inspect.getmembers(textwrap, inspect.isroutine)]
    methods = [inspect.getsource(value) for _, value in inspect.getmembers(textwrap.TextWrapper, inspect.isfunction)]
    return [*functions[:2], "", "naïve café — 東京 🙂\n\n  indented", *functions[2:], "x", *methods]


@pytest.fixture(scope="module")
def tokens(texts) -> list[list[int]]:
    """Reference: the documents as BOS + tokens, without empty ones."""
    from helpers import BOS, DEMO_LM
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    return [[BOS] + tokenizer.encode(text, add_special_tokens=False).ids for text in texts if text]


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes a column of documents as JSON lines and returns the path."""

    def write(documents: list, column: str = "text", name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": i, column: doc}) + "\n" for i, doc in enumerate(documents)))
        return str(path)

    return write


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> str:
    """48 tokens to hold out, then 400 to train on: ten batches of 40, twenty-five contexts of 16."""
    from helpers import counted_documents

    path = tmp_path_factory.mktemp("counted") / "data.jsonl"
    path.write_text("".join(json.dumps({"tokens": document}) + "\n" for document in counted_documents(48, 400)))
    return str(path)


# SAEs


@pytest.fixture(params=["dense", "sparse"])
def form(request, monkeypatch):
    """Every promise is kept by both forms of TopK and BatchTopK, whatever they cost at these sizes."""
    import sparse_ops

    monkeypatch.setattr(sparse_ops, "sparse_is_cheaper", lambda *_: request.param == "sparse")
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 1)


# Commands


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The commands as a user without an account or settings runs them. For them, the hub is what listens on
    `program.port`: nothing, unless a test starts a hub_server.Hub there.
    """
    from fork_server import ForkServer
    from helpers import unused_port

    home, port = tmp_path_factory.mktemp("home"), unused_port()
    settings = ("WANDB_", "HF_", "TRANSFORMERS_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    env = {key: value for key, value in env.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home / "hf"), "NETRC": str(home / "netrc")}
    env |= {"HOME": str(home), "WANDB_CONFIG_DIR": str(home), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_DISABLE_XET": "1"}
    with ForkServer(env) as server:
        server.port = port
        yield server


# Training


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    """Local records only, whoever is logged in."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def training_data(tmp_path_factory) -> str:
    """Documents of Python code."""
    path = tmp_path_factory.mktemp("training_data") / "code.jsonl"
    parts = inspect.getsource(textwrap).split("\n\n")
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return str(path)


@pytest.fixture
def training_cfg(training_data, tmp_path):
    """A function that completes a small training config, in a folder of this test."""
    from helpers import completed_training_cfg

    return lambda output_dir="runs", **changes: completed_training_cfg(training_data, tmp_path / output_dir, **changes)


@pytest.fixture(scope="module")
def uninterrupted(model, training_data, tmp_path_factory):
    """SAEs, results and records of the group that nothing stopped."""
    from helpers import OFTEN, SAES, completed_training_cfg, lines_of, train

    from logs import run_folder

    folder = tmp_path_factory.mktemp("uninterrupted")
    cfgs = [completed_training_cfg(training_data, folder, **changes, **OFTEN) for changes in SAES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        saes, results = train(model, cfgs)
    return saes, results, [lines_of(run_folder(cfg)) for cfg in cfgs]
