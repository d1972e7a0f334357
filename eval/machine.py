"""What a measurement was made on: versions, processor and commit, without the names of machines and people."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def machine(device: str) -> dict[str, str]:
    """What ran it: versions, processor and the commit, without the machine's name."""
    where = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": where, "commit": commit()}


def processor() -> str:
    """The model of the CPU, where the system tells, and otherwise its architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of the checkout that this runs from; "" for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return ""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip()
