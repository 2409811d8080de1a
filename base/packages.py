"""Which build of torch suits this machine, and how the installed packages differ from those that are tested.

quickstart.py reads this before anything is installed, with any Python: only the standard library, and old syntax.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/"  # with a folder for each build: cpu, cu126, cu130
COMPUTING = ("torch", "transformers", "tokenizers", "safetensors", "numpy")  # whose version may change a result


def torch_build():
    """The folder of TORCH_INDEX whose torch suits this machine, or None if the one that PyPI has does.

    PyPI has a CUDA build for Linux and a CPU build for Windows. CUDA 13 needs version 580 of the driver and compute
    capability 7.5; CUDA 12.6 has nothing for 10.0 and above.
    """
    if not shutil.which("nvidia-smi"):
        return "cpu" if sys.platform == "linux" else None
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        first_gpu = subprocess.check_output(query, timeout=20).decode().splitlines()[0]
        driver, _, capability = first_gpu.partition(", ")
        driver, capability = int(driver.partition(".")[0]), float(capability)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # a driver that does not answer
        return None
    if capability < 7.5 or (driver < 580 and capability < 10):
        return "cu126"
    return "cu130" if os.name == "nt" else None


def torch_command():
    """The command that replaces torch by a build for this machine's NVIDIA GPU."""
    build = torch_build()
    build = "cu130" if build in (None, "cpu") else build
    return f"pip install --force-reinstall torch --index-url {TORCH_INDEX}{build}"


def untested_versions():
    """Of each installed package that computes and is not in a tested version: "NAME VERSION (tested: VERSIONS)"."""
    from importlib.metadata import PackageNotFoundError, version  # since Python 3.8

    tested = {}
    for line in CONSTRAINTS.read_text("utf-8").splitlines():
        name, equals, pin = line.partition(";")[0].strip().partition("==")
        if equals:
            tested.setdefault(name, []).append(pin)
    found = []
    for name in COMPUTING:
        try:
            installed = version(name).partition("+")[0]  # without the build, such as +cpu
        except PackageNotFoundError:
            continue
        if installed not in tested[name]:
            found.append(f"{name} {installed} (tested: {' or '.join(tested[name])})")
    return found
