"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def machine(*packages: str, **facts: Any) -> dict[str, Any]:
    """CPU, cores, platform, and the versions of Python, torch, TRL, transformers and of further packages."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    named = ("torch", "trl", "transformers", *packages)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in named},
        **facts,
    }
