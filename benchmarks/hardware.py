"""Which machine and which versions a result is from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["describe", "last_level_cache_bytes", "result_stem"]

_FLAGS = re.compile(r"(sse4_2|popcnt|avx.*|fma|f16c|bmi2|amx.*)")


def describe() -> dict[str, Any]:
    """The machine and the source, as far as Linux says: nothing here names a path or a user."""
    cpu = _first_processor()
    flags = [flag for flag in cpu.get("flags", "").split() if _FLAGS.fullmatch(flag)]
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    total = re.search(r"MemTotal:\s+(\d+) kB", memory)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu.get("model name", platform.machine()),
        "family_model_stepping": "/".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": flags,
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in cpu.get("flags", "").split(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": int(total.group(1)) * 1024 if total else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "source": _source(),
    }


def last_level_cache_bytes() -> int:
    """Of the first processor; 32 MiB when the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", file.read_text(encoding="utf-8").strip())
        if match:
            sizes.append(int(match.group(1)) << (10 if match.group(2) == "K" else 20))
    return max(sizes, default=32 << 20)


def available_memory_bytes() -> int:
    """What could be allocated now without swapping."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return int(match.group(1)) * 1024 if match else 4 << 30


def result_stem(machine: dict[str, Any]) -> str:
    """<date>-<cpu>, for the names of result files."""
    cpu = re.sub(r"\((r|tm)\)|processor|cpu|@.*", " ", str(machine["cpu"]).lower())
    return f"{machine['date']}-{re.sub(r'[^a-z0-9]+', '-', cpu).strip('-') or 'unknown'}"


def _first_processor() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _source() -> str:
    """The commit, with "-dirty" when files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
