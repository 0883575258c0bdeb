"""The repo is flat modules: make them importable from the tests. And what all test modules share."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on CPU tensors; it has to be set before Triton is imported

# These files take longest. They are begun first, so that both processes end at about the same time.
SLOWEST = ["test_resume", "test_stream_faults", "test_main", "test_hub", "test_triton_ops", "test_wandb"]


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
