"""Builds rnn_ext._C: csrc/ops and csrc/cpu with the C++ compiler, csrc/cuda (torch-free) with nvcc alone.

Environment variables:
    RNN_EXT_BUILD        auto (default: CUDA too if torch is a CUDA build and nvcc is found), cpu, or cuda
    RNN_EXT_CPU_ISAS     instruction sets besides the baseline: native (default: the best one of this machine), all, or
                         names out of avx2, avx512 and amx
    RNN_EXT_CUDA_ARCHS   compute capabilities for nvcc, "80;90" for instance
    CXX                  C++ compiler; CPPFLAGS, CXXFLAGS and LDFLAGS come after our own flags
    MAX_JOBS             compilers run at a time (default: one per core)
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from compiling import Job, compile_and_link  # noqa: E402

NVCC = runpy.run_path(str(ROOT / "rnn_ext" / "_nvcc.py"))
PROCESSOR = runpy.run_path(str(ROOT / "rnn_ext" / "_processor.py"))
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fwrapv", "-DNDEBUG", "-ffp-contract=off", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", "-MMD"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", f"-I{ROOT / 'csrc'}", "-MMD"]
CUDA_ARCHS = "80;90"  # 8.6 and 8.9 run the code of 8.0; what comes after 9.0 compiles its PTX when it is loaded


def sources(folder: str, pattern: str) -> list[str]:
    """Source files relative to the project, as setuptools wants them, in an order that does not depend on the disk."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob(pattern))


def find_cxx() -> str:
    """The C++ compiler's command line; raises SystemExit where there is none."""
    named = os.environ.get("CXX", "").strip()
    for command in [named] if named else ["c++", "g++", "clang++"]:
        try:
            words, failed = shlex.split(command), False
        except ValueError as error:
            raise SystemExit(f"rnn_ext needs a C++ compiler, and CXX={named} cannot be read: {error}.") from None
        if shutil.which(words[0]):
            with contextlib.suppress(OSError):  # of a file that is none for this machine
                if subprocess.run([*words, "--version"], capture_output=True).returncode == 0:
                    return command
            failed = True
    what = "none of c++, g++ and clang++ is on the PATH, or works"
    if named:
        what = f"CXX={named} {'fails when asked for its --version' if failed else 'is not a program'}"
    raise SystemExit(f"rnn_ext needs a C++ compiler, and {what}: install g++ (Debian: apt-get install g++) or set CXX.")


def check_mode(mode: str) -> None:
    if mode not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"RNN_EXT_BUILD is {mode!r}; expected auto, cpu or cuda.")


def choose_cuda(mode: str, nvcc: str | None, torch_cuda: str | None) -> tuple[str | None, str]:
    """nvcc if the CUDA kernels are to be built with it, and the reason; SystemExit where the wish cannot be met.

    `torch_cuda`: the CUDA version that torch is built for; None: a CPU build.
    """
    missing = None if nvcc else f"nvcc was not found under CUDA_HOME or, without that, {NVCC['LOOKED_FOR']}"
    if mode == "cuda" and missing:
        raise SystemExit(f"RNN_EXT_BUILD=cuda cannot be met: {missing}. RNN_EXT_BUILD=cpu builds without.")
    if mode == "cpu":
        return None, "RNN_EXT_BUILD=cpu"
    if mode == "auto" and torch_cuda is None:
        return None, "torch is a CPU build; RNN_EXT_BUILD=cuda compiles them all the same"
    return None if missing else nvcc, missing or f"by {nvcc}"


def choose_parts() -> list[str]:
    """The parts of the CPU kernels to compile; SystemExit where RNN_EXT_CPU_ISAS names what is none."""
    try:
        return PROCESSOR["choose_parts"](os.environ.get("RNN_EXT_CPU_ISAS", ""), PROCESSOR["cpu_features"]()[1])
    except ValueError as error:
        raise SystemExit(f"{error}.") from None


def cuda_arch_flags() -> list[str]:
    """nvcc's options; raises SystemExit for what it cannot compile the kernels for."""
    archs = re.findall(r"[^\s,;]+", (os.environ.get("RNN_EXT_CUDA_ARCHS") or CUDA_ARCHS).replace(".", ""))
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80]
    if wrong or not archs:
        named = os.environ["RNN_EXT_CUDA_ARCHS"]
        raise SystemExit(f"RNN_EXT_CUDA_ARCHS is {named!r}; expected compute capabilities from 8.0 on, '80;90' say.")
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*machine_code, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_link_args(nvcc: str) -> list[str]:
    # The runtime is linked statically: the library loads beside a torch of any CUDA version, or none.
    return [*NVCC["library_folders"](nvcc), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def openmp_link_args(torch_lib: Path) -> list[str]:
    # torch's wheels bring their own libgomp. Linking that very file, whatever its soname, keeps one OpenMP runtime and
    # one thread pool in the process.
    return [str(path) for path in sorted(torch_lib.glob("libgomp*.so*"))[:1]] or ["-lgomp"]


class BuildPy(build_py):
    """Python files from an earlier build do not slip into the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def env_flags(*names: str) -> list[str]:
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def main() -> None:
    mode = os.environ.get("RNN_EXT_BUILD") or "auto"
    check_mode(mode)
    parts = choose_parts()
    try:
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError as error:
        raise SystemExit(f"rnn_ext is compiled against torch, which cannot be imported: {error}.") from None
    nvcc, reason = choose_cuda(mode, NVCC["find_nvcc"](), torch.version.cuda)
    torch_lib = Path(torch.__file__).parent / "lib"

    class BuildCommand(build_ext):
        """Compiles with ninja, and writes rnn_ext/_build_info.py."""

        def run(self):
            if sys.platform != "linux":
                raise SystemExit(f"rnn_ext builds on Linux only, and this is {sys.platform}.")
            self.cxx = shlex.split(find_cxx())
            version = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout
            self.compiler_name = version.splitlines()[0] if version else self.cxx[0]
            self.force = True  # ninja knows what is out of date, setuptools only looks at the sources
            super().run()
            folders = [Path(self.build_lib, "rnn_ext"), *([ROOT / "rnn_ext"] if self.inplace else [])]
            for folder in folders:
                self.write_build_info(folder / "_build_info.py")

        def jobs(self, folder: Path) -> list[Job]:
            # Neither ninja nor -MMD watches torch, Python and the compiler: each has a folder of its own. The kernels
            # know no torch, and outlast it.
            compiler = re.sub(r"[^\w.+-]+", "-", self.compiler_name)
            kernels = folder / f"kernels-{compiler}"
            ops = folder / f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{compiler}"
            cxx = [*self.cxx, *CXX_FLAGS, *env_flags("CPPFLAGS", "CXXFLAGS")]
            # -isystem wins over -I: warnings are asked for in our own code only.
            system = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
            for_torch = [*cxx, *(["-DRNN_EXT_WITH_CUDA"] if nvcc else []), *system, "-DTORCH_EXTENSION_NAME=_C"]
            left_out = [part for part in PROCESSOR["every_part"]() if part not in parts]
            without = [f"-DRNN_EXT_WITHOUT_{part.upper()}" for part in left_out]
            jobs = []
            for file in sources("cpu", "*.cpp"):
                part = PROCESSOR["part_of"](file)
                if part in left_out:
                    continue
                # Which kernels there are only the file that chooses them knows.
                command = [*cxx, *without] if Path(file).name == "dispatch.cpp" else cxx
                if part == "baseline" and platform.machine() in ("x86_64", "AMD64"):
                    command = [*cxx, "-O1"]  # for processors before 2013: two thirds of the time to compile
                jobs.append(Job(ROOT / file, kernels / f"{Path(file).stem}.o", command))
            for file in sources("ops", "*.cpp"):
                if nvcc or not Path(file).name.startswith("cuda"):
                    jobs.append(Job(ROOT / file, ops / f"{Path(file).stem}.o", for_torch))
            for file in sources("cuda", "*.cu") if nvcc else []:
                command = [nvcc, *NVCC_FLAGS, *cuda_arch_flags(), "-DRNN_EXT_WITH_CUDA"]
                jobs.append(Job(ROOT / file, folder / "cuda" / f"{Path(file).stem}.o", command))
            return jobs

        def build_extension(self, ext):
            print(f"rnn_ext: compiling for torch {torch.__version__} in {torch_lib.parent}")
            print(f"rnn_ext: C++: {self.compiler_name}")
            print(f"rnn_ext: CPU kernels: {', '.join(parts)} (RNN_EXT_CPU_ISAS=all compiles every instruction set)")
            print(f"rnn_ext: CUDA kernels: {'yes' if nvcc else 'no'} ({reason})", flush=True)
            # A place that outlasts pip's temporary folders, so that editable installs are incremental.
            folder = ROOT / "build"
            jobs = self.jobs(folder)
            libraries = [f"-L{torch_lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
            cuda = cuda_link_args(nvcc) if nvcc else []
            link = [*self.cxx, "-shared", *libraries, *openmp_link_args(torch_lib), *cuda, *env_flags("LDFLAGS")]
            built = folder / f"_C-{sys.implementation.cache_tag}-torch-{torch.__version__}.so"
            processes = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
            compile_and_link(folder, jobs, link, built, processes)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)

        def write_build_info(self, path: Path) -> None:
            # A file beside the library, since it is wanted where the library cannot be loaded.
            values = {"TORCH_VERSION": str(torch.__version__), "COMPILER": self.compiler_name, "CUDA": nvcc is not None}
            values["CPU_KERNELS"] = parts
            text = "# Written by setup.py: what rnn_ext._C was built for and with.\n"
            path.with_suffix(".tmp").write_text(text + "".join(f"{key} = {value!r}\n" for key, value in values.items()))
            path.with_suffix(".tmp").replace(path)

    extension = Extension("rnn_ext._C", sources("ops", "*.cpp") + sources("cpu", "*.cpp"), language="c++")
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildCommand, "build_py": BuildPy})


if __name__ == "__main__":
    sys.exit(main())
