"""Builds rnn_ext._C: csrc/ops and csrc/cpu with the C++ compiler, csrc/cuda (torch-free) with nvcc alone.

Environment variables:
    RNN_EXT_BUILD        auto (default: CUDA too where rnn_ext/_nvcc.py finds nvcc), cpu, or cuda
    RNN_EXT_CUDA_ARCHS   compute capabilities for nvcc, "80;90" for instance
    CXX                  C++ compiler
    MAX_JOBS             compilers run at a time (default: one per core)
"""

from __future__ import annotations

import contextlib
import os
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
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NVCC = runpy.run_path(str(ROOT / "rnn_ext" / "_nvcc.py"))
CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
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


def choose_cuda(mode: str, cuda_ops: list[str], nvcc: str | None, ninja: str | None) -> tuple[str | None, str]:
    """nvcc if the CUDA kernels are to be built with it, and the reason; SystemExit where the wish cannot be met."""
    if mode not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"RNN_EXT_BUILD is {mode!r}; expected auto, cpu or cuda.")
    missing = None
    if not cuda_ops:
        missing = "this version of rnn_ext has no CUDA ops"
    elif nvcc is None:
        missing = f"nvcc was not found under CUDA_HOME or, without that, {NVCC['LOOKED_FOR']}"
    elif ninja is None:
        missing = "ninja, which runs nvcc, was not found (pip install ninja)"
    if mode == "cuda" and missing:
        raise SystemExit(f"RNN_EXT_BUILD=cuda cannot be met: {missing}. RNN_EXT_BUILD=cpu builds without.")
    if mode == "cpu":
        return None, "RNN_EXT_BUILD=cpu"
    return None if missing else nvcc, missing or f"by {nvcc}"


def cuda_arch_flags() -> list[str]:
    """nvcc's options; raises SystemExit for what it cannot compile the kernels for."""
    archs = re.findall(r"[^\s,;]+", (os.environ.get("RNN_EXT_CUDA_ARCHS") or CUDA_ARCHS).replace(".", ""))
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80]
    if wrong or not archs:
        named = os.environ["RNN_EXT_CUDA_ARCHS"]
        raise SystemExit(f"RNN_EXT_CUDA_ARCHS is {named!r}; expected compute capabilities from 8.0 on, '80;90' say.")
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*machine_code, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def compile_cuda(nvcc: str, files: list[str], folder: Path) -> list[str]:
    """Compiles csrc/cuda with ninja; returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*NVCC_FLAGS, *cuda_arch_flags(), f"-I{ROOT / 'csrc'}", "-DRNN_EXT_WITH_CUDA"]
    command = f"{shlex.join([nvcc, *flags])} -MD -MF $out.d -c $in -o $out"
    lines = [f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  deps = gcc\n"]
    objects = [str(folder / (Path(file).stem + ".o")) for file in files]
    for file, obj in zip(files, objects, strict=True):
        escaped = [str(path).replace(" ", "$ ").replace(":", "$:") for path in (obj, ROOT / file)]
        lines.append(f"build {escaped[0]}: nvcc {escaped[1]}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    if subprocess.run(["ninja", "-C", str(folder), "-j", os.environ["MAX_JOBS"]]).returncode != 0:
        raise SystemExit("nvcc could not compile rnn_ext's CUDA kernels (see above). RNN_EXT_BUILD=cpu builds without.")
    return objects


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


def main() -> None:
    # csrc/ops/cuda*.cpp binds the CUDA kernels to torch; without it there is nothing that could call them.
    cuda_ops = sources("ops", "cuda*.cpp")
    with contextlib.suppress(ImportError):
        import ninja  # its program is not on the PATH where the environment is not activated

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ["PATH"]
    mode = os.environ.get("RNN_EXT_BUILD") or "auto"
    nvcc, reason = choose_cuda(mode, cuda_ops, NVCC["find_nvcc"](), shutil.which("ninja"))
    try:
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths
    except ImportError as error:
        raise SystemExit(f"rnn_ext is compiled against torch, which cannot be imported: {error}.") from None

    torch_lib = Path(torch.__file__).parent / "lib"
    system_includes = [*include_paths(), sysconfig.get_path("include")]

    class BuildCommand(BuildExtension):
        """torch's build command, plus the CUDA objects and rnn_ext/_build_info.py."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # ninja knows what is out of date, setuptools only looks at the sources
            # A place that outlasts pip's editable installs, so that they are incremental too. ninja does not watch
            # system headers: another Python or torch gets objects of its own.
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def build_extensions(self):
            cxx = os.environ["CXX"]
            version = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout
            self.compiler_name = version.splitlines()[0] if version else cxx
            print(f"rnn_ext: compiling for torch {torch.__version__} in {torch_lib.parent}")
            print(f"rnn_ext: C++: {self.compiler_name}, {len(self.extensions[0].sources)} files")
            print(f"rnn_ext: CUDA: {'yes' if nvcc else 'no'} ({reason})", flush=True)
            if nvcc:
                files = sources("cuda", "*.cu")
                self.extensions[0].extra_objects += compile_cuda(nvcc, files, Path(self.build_temp, "cuda"))
                self.extensions[0].extra_link_args += cuda_link_args(nvcc)
            super().build_extensions()

        def run(self):
            if sys.platform != "linux":
                raise SystemExit(f"rnn_ext builds on Linux only, and this is {sys.platform}.")
            os.environ["CXX"] = find_cxx()
            os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
            super().run()
            folders = [Path(self.build_lib, "rnn_ext"), *([ROOT / "rnn_ext"] if self.inplace else [])]
            for folder in folders:
                self.write_build_info(folder / "_build_info.py")

        def write_build_info(self, path: Path) -> None:
            # A file beside the library, since it is wanted where the library cannot be loaded.
            values = {"TORCH_VERSION": str(torch.__version__), "COMPILER": self.compiler_name, "CUDA": nvcc is not None}
            text = "# Written by setup.py: what rnn_ext._C was built for and with.\n"
            path.with_suffix(".tmp").write_text(text + "".join(f"{key} = {value!r}\n" for key, value in values.items()))
            path.with_suffix(".tmp").replace(path)

    ops = [file for file in sources("ops", "*.cpp") if nvcc or file not in cuda_ops]
    extension = Extension(
        "rnn_ext._C",
        ops + sources("cpu", "*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("RNN_EXT_WITH_CUDA", None)] if nvcc else [],
        # -isystem wins over -I: warnings are asked for in our own code only.
        extra_compile_args=CXX_FLAGS + [f"-isystem{path}" for path in system_includes],
        library_dirs=[str(torch_lib)],
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        extra_link_args=openmp_link_args(torch_lib),
        language="c++",
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildCommand, "build_py": BuildPy})


if __name__ == "__main__":
    sys.exit(main())
