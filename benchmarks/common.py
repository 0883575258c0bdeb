"""What the benchmarks share. Importing this module lets them import those of the repository."""

import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from console import markdown_table  # noqa: E402, F401


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def machine(device: str = "cpu") -> str:
    """The processor or GPU, the threads and the version of torch."""
    import torch  # not at the top: peers.py starts without it

    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def median_and_range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def quartiles(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} – {high:{form}})"
