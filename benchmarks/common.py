"""What the benchmarks share: where the real bases and data are, and the facts printed with every figure."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_data() -> Path:
    """Return the folder of real bases and data sets (LORAFLEET_TEST_DATA); exit with a sentence if it is missing."""
    folder = Path(os.environ.get("LORAFLEET_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (folder / "bases").is_dir():
        sys.exit(f"this benchmark needs the real bases and data sets in {folder}; set LORAFLEET_TEST_DATA to their folder.")
    return folder


def facts(*packages: str) -> dict[str, str]:
    """Return machine and versions, for the output."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
