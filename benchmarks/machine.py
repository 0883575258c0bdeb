"""The machine that a benchmark runs on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()
