"""Where nvcc is, and what it links with. Imports nothing of the package: setup.py loads this file without torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

LOOKED_FOR = "on the PATH, in /usr/local/cuda or among the Python packages (the extra nvcc)"


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc where that is set, else the system's, else that of the nvidia-cuda-nvcc package."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home, "bin", "nvcc")))
    # pip hides the environment's packages from the builds that it isolates, but not where they lie.
    folders = [*sys.path, sysconfig.get_path("purelib")]
    packaged = [str(path) for folder in folders for path in sorted(Path(folder, "nvidia").glob("cu*/bin/nvcc"))]
    return next(filter(None, map(shutil.which, ["nvcc", "/usr/local/cuda/bin/nvcc", *packaged])), None)


def library_folders(nvcc: str) -> list[str]:
    """The -L arguments for CUDA's libraries. nvcc may be a wrapper anywhere, so it is asked; where it comes from Python
    packages, it does not know that they lie in lib, not lib64."""
    command = [nvcc, "--dryrun", "-c", "any.cu"]
    dry_run = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    libraries = next((line for line in dry_run.splitlines() if "LIBRARIES=" in line), "")
    folders = shlex.split(libraries.partition("=")[2])
    return folders + [folder.removesuffix("64") for folder in folders if folder.endswith("/lib64")]


if __name__ == "__main__":
    sys.exit(find_nvcc() is None)
