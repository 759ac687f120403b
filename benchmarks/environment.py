"""The machine and the software a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

CPUINFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
X86_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_vbmi2",
    "amx_int8",
)
ARM_FLAGS = ("asimd", "asimddp", "i8mm", "sve")
FLAGS = frozenset((*X86_FLAGS, *ARM_FLAGS))
"""CPU features that decide which kernels a runtime takes."""
PACKAGES = ("numpy", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "llama-cpp-python")


class Environment(BaseModel):
    """What has to be known to repeat a measurement."""

    model_config = ConfigDict(frozen=True)

    cpu: str
    flags: tuple[str, ...]
    cores: int
    """Physical cores, or logical ones where the system does not tell."""
    logical_cores: int
    governor: str | None = None
    ram_bytes: int
    os: str
    python: str
    versions: dict[str, str]
    commit: str | None = None
    """Of losa-deploy, when it runs from a git checkout."""

    def line(self) -> str:
        """One line for tables: CPU, cores, memory, system."""
        return f"{self.cpu}, {self.cores} cores, {self.ram_bytes / 2**30:.0f} GiB RAM, {self.os}"


def collect() -> Environment:
    """Describe this machine; nothing heavy is imported, unknown facts are left out."""
    logical = os.cpu_count() or 1
    info = _read(CPUINFO) or ""
    return Environment(
        cpu=cpu_name(info) or platform.processor() or platform.machine(),
        flags=cpu_flags(info),
        cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        governor=_read(GOVERNOR),
        ram_bytes=int(psutil.virtual_memory().total),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        commit=_commit(Path(__file__)),
    )


def cpu_name(cpuinfo: str) -> str:
    """The model name in the text of /proc/cpuinfo; empty if it has none (as on ARM)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def cpu_flags(cpuinfo: str) -> tuple[str, ...]:
    """Those of `FLAGS` that the first CPU in the text of /proc/cpuinfo lists."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(flag for flag in value.split() if flag in FLAGS)
    return ()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("losa-deploy", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit(file: Path) -> str | None:
    """HEAD of the checkout that tracks `file`; None for an installed package inside someone's checkout."""
    folder = str(file.resolve().parent)
    try:
        subprocess.run(
            ["git", "-C", folder, "ls-files", "--error-unmatch", file.name],
            check=True,
            capture_output=True,
            timeout=10,
        )
        head = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None
