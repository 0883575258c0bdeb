"""The repo is flat modules: make them importable from the tests. And what all test modules share."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on CPU tensors; it has to be set before Triton is imported


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
