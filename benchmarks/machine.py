"""What the machine and the software are, as published with the numbers: no host name, no path, no user."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

# Processor features that decide which kernels run.
RELEVANT_FLAGS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = ("modernbert-decoder", "onnxruntime", "numpy", "tokenizers", "safetensors")


def describe_machine() -> dict[str, Any]:
    """Processor, its relevant features, memory and system."""
    name, flags = _processor()
    return {
        "cpu": name,
        "flags": [flag for flag in RELEVANT_FLAGS if flag in flags],
        "logical_processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def harness_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the engine runs on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            from modernbert_decoder import __version__

            versions[package] = f"{__version__} (not installed)"
    return versions


def slug(name: str) -> str:
    """A processor's name as part of a file name.

    >>> slug("Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz")
    'intel-xeon-gold-6130'
    """
    name = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*|\b\d+-Core Processor\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _processor() -> tuple[str, frozenset[str]]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features", "")).split())


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
