"""setup.py's decisions, the build backend, the loader's sentences, what a wheel is made of. Nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnn_ext
from rnn_ext import _loader, _nvcc, _processor

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(rnn_ext.__file__).parent


def load_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_py():
    pytest.importorskip("setuptools")
    return load_file(ROOT / "setup.py")


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load_file(ROOT / "build_backend" / "backend.py")


@pytest.mark.parametrize(
    ("mode", "nvcc", "torch_cuda", "expected", "reason"),
    [
        ("auto", "/opt/nvcc", "13.0", "/opt/nvcc", "by /opt/nvcc"),
        ("auto", "/opt/nvcc", None, None, "torch is a CPU build; RNN_EXT_BUILD=cuda"),
        ("auto", None, "13.0", None, "nvcc was not found"),
        ("cpu", "/opt/nvcc", "13.0", None, "RNN_EXT_BUILD=cpu"),
        ("cuda", "/opt/nvcc", None, "/opt/nvcc", "by /opt/nvcc"),
    ],
)
def test_choose_cuda(setup_py, mode, nvcc, torch_cuda, expected, reason):
    chosen, why = setup_py.choose_cuda(mode, nvcc, torch_cuda)
    assert chosen == expected
    assert why.startswith(reason)


def test_cuda_without_nvcc_is_refused(setup_py):
    with pytest.raises(SystemExit, match="RNN_EXT_BUILD=cuda cannot be met: nvcc was not found"):
        setup_py.choose_cuda("cuda", None, "13.0")


@pytest.mark.parametrize("mode", ["gpu", "CUDA"])
def test_unknown_build_is_refused(setup_py, mode):
    with pytest.raises(SystemExit, match=f"RNN_EXT_BUILD is '{mode}'; expected auto, cpu or cuda."):
        setup_py.check_mode(mode)


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AMX = AVX512 | {"avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "amx_tile", "avx_vnni"}


@pytest.mark.parametrize(
    ("wish", "features", "parts"),
    [
        ("", set(), "baseline"),
        ("native", {"avx2", "fma"}, "baseline"),
        ("native", AVX2, "baseline avx2"),
        ("native", AVX2 | {"avx_vnni"}, "baseline avx2 avx2_vnni"),
        ("", AVX512, "baseline avx512"),
        ("", AVX512 | {"avx512_bf16"}, "baseline avx512 avx512_bf16"),
        ("", AMX, "baseline avx512 avx512_bf16 avx512_vnni avx512_amx"),
        ("all", set(), "baseline avx2 avx2_vnni avx512 avx512_bf16 avx512_vnni avx512_amx"),
        ("baseline", AMX, "baseline"),
        ("avx2", set(), "baseline avx2 avx2_vnni"),
        ("avx512; avx2", AVX2, "baseline avx2 avx2_vnni avx512 avx512_bf16 avx512_vnni"),
        ("amx", set(), "baseline avx512 avx512_bf16 avx512_vnni avx512_amx"),
    ],
)
def test_parts_of_the_kernels_to_compile(wish, features, parts):
    assert _processor.choose_parts(wish, features) == parts.split()


@pytest.mark.parametrize("wish", ["sse9", "avx2,sse9", "native avx2", "all,avx2"])
def test_unknown_instruction_sets_are_refused(setup_py, monkeypatch, wish):
    monkeypatch.setenv("RNN_EXT_CPU_ISAS", wish)
    known = "expected native, all, or names out of baseline, avx2, avx512, amx."
    with pytest.raises(SystemExit, match=re.escape(f"RNN_EXT_CPU_ISAS is {wish!r}; {known}")):
        setup_py.choose_parts()


def test_every_kernel_file_belongs_to_a_part():
    """A part that this processor cannot run is left out with all of its files, and dispatch.cpp with none."""
    files = [path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")]
    parts = {file: _processor.part_of(file) for file in files}
    assert {file for file, part in parts.items() if part is None} == {
        "dispatch.cpp",
        "kernels_neon_dot.cpp",
        "memory.cpp",
    }
    assert set(parts.values()) - {None} == set(_processor.every_part())
    assert parts["kernels_avx512_double.cpp"] == "avx512"
    assert parts["kernels_avx512_bf16.cpp"] == "avx512_bf16"
    assert parts["kernels_avx512_amx_int8.cpp"] == "avx512_amx"
    assert parts["kernels_avx2_vnni.cpp"] == "avx2_vnni"


def test_dispatch_knows_every_part_that_may_be_left_out():
    text = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    named = set(re.findall(r"defined\(RNN_EXT_WITHOUT_(\w+)\)", text))
    assert named == {part.upper() for part in _processor.every_part()} - {"BASELINE"}


@pytest.fixture
def compiling(setup_py):
    import compiling

    return compiling


def compile_c(compiling, folder: Path, sources: dict[str, str], **flags: list[str]) -> list[str]:
    """Compiles and links C files with the project's own machinery; the files that were compiled, in order."""
    (folder / "objects").mkdir(exist_ok=True)
    jobs = []
    for name, text in sources.items():
        source = folder / name
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        command = ["cc", "-MMD", *flags.get(source.stem, [])]
        jobs.append(compiling.Job(source, folder / "objects" / f"{source.stem}.o", command))
    before = {job.source.name: job.output.stat().st_mtime_ns if job.output.exists() else 0 for job in jobs}
    compiling.compile_and_link(folder / "objects", jobs, ["cc", "-shared"], folder / "lib.so", 2)
    return [job.source.name for job in jobs if job.output.stat().st_mtime_ns != before[job.source.name]]


def test_only_what_has_changed_is_compiled(compiling, tmp_path, capfd):
    folder = tmp_path / "a folder: $1"
    folder.mkdir()
    (folder / "both.h").write_text("#define ONE 1\n")
    sources = {"a.c": '#include "both.h"\nint a(void) { return ONE; }\n', "b.c": "int b(void) { return 2; }\n"}
    assert compile_c(compiling, folder, sources) == ["a.c", "b.c"]
    shown = capfd.readouterr().out
    assert re.search(r"^rnn_ext: 2 files to compile, 2 at a time: about \d+ s$", shown, re.MULTILINE)
    assert re.search(r"^rnn_ext: 2 of 2 files, \d+ s, about 0 s left: [ab]\.c$", shown, re.MULTILINE)
    assert re.search(r"^rnn_ext: lib\.so linked, \d+ s$", shown, re.MULTILINE)
    assert float((folder / "objects" / "a.o.seconds").read_text()) >= 0
    assert compile_c(compiling, folder, sources) == []
    assert capfd.readouterr().out == ""
    sources["b.c"] = "int b(void) { return 3; }\n"
    assert compile_c(compiling, folder, sources) == ["b.c"]
    (folder / "both.h").write_text("#define ONE 11\n")
    assert compile_c(compiling, folder, sources) == ["a.c"]
    assert compile_c(compiling, folder, sources, a=["-DX=$HOME y"]) == ["a.c"]


def test_the_compilers_words_are_shown_where_it_fails(compiling, tmp_path, capfd):
    with pytest.raises(SystemExit, match="could not be compiled"):
        compile_c(compiling, tmp_path, {"a.c": "int a(void) { return b; }\n"})
    assert "undeclared" in capfd.readouterr().out


def test_progress_tells_files_seconds_and_an_estimate(compiling, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(compiling.time, "monotonic", lambda: now[0])
    said = []
    progress = compiling.Progress({"/src/a.cpp": 300, "/src/b.cpp": 100, "/src/c.cpp": 100}, 2, said.append)
    now[0] = 115.0
    progress.show(None)  # nothing has finished: the table's word
    now[0] = 400.0  # twice as long as the table says
    progress.show("[1/4] /src/a.cpp\n")
    progress.show("warning: x\n")
    progress.show("[2/4] /src/b.cpp\n")
    progress.show("[3/4] /src/c.cpp\n")
    progress.show("[4/4] _C.so\n")
    assert said == [
        "rnn_ext: 3 files to compile, 2 at a time: about 4 min",
        "rnn_ext: 0 of 3 files, 15 s, about 4 min left: ...",
        "rnn_ext: 1 of 3 files, 300 s, about 3 min left: a.cpp",
        "warning: x",
        "rnn_ext: 2 of 3 files, 300 s, about 75 s left: b.cpp",
        "rnn_ext: 3 of 3 files, 300 s, about 0 s left: c.cpp",
        "rnn_ext: _C.so linked, 300 s",
    ]


def test_unknown_build_ends_with_one_sentence():
    environ = {**os.environ, "RNN_EXT_BUILD": "frob"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "RNN_EXT_BUILD is 'frob'; expected auto, cpu or cuda."


def test_cuda_archs(setup_py, monkeypatch):
    monkeypatch.setenv("RNN_EXT_CUDA_ARCHS", "8.0;90")
    assert setup_py.cuda_arch_flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("RNN_EXT_CUDA_ARCHS", "8.0 9.0a")
    assert setup_py.cuda_arch_flags()[1] == "-gencode=arch=compute_90a,code=sm_90a"
    for wrong in ("75", "8.0;volta", ";"):
        monkeypatch.setenv("RNN_EXT_CUDA_ARCHS", wrong)
        with pytest.raises(
            SystemExit, match=f"RNN_EXT_CUDA_ARCHS is '{wrong}'; expected compute capabilities from 8.0"
        ):
            setup_py.cuda_arch_flags()
    monkeypatch.setenv("RNN_EXT_CUDA_ARCHS", "")
    assert f"-gencode=arch=compute_{setup_py.CUDA_ARCHS.split(';')[0]}" in setup_py.cuda_arch_flags()[0]


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_find_nvcc_looks_under_cuda_home_first(setup_py, monkeypatch, tmp_path):
    assert setup_py.NVCC["find_nvcc"].__doc__ == _nvcc.find_nvcc.__doc__  # one place for all who look
    nvcc = program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _nvcc.find_nvcc() == str(nvcc)
    nvcc.unlink()
    assert _nvcc.find_nvcc() is None


def test_find_nvcc_among_the_packages_where_the_system_has_none(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    which = shutil.which
    monkeypatch.setattr(_nvcc.shutil, "which", lambda name: which(name) if str(tmp_path) in name else None)
    assert _nvcc.find_nvcc() is None
    hidden = program(tmp_path / "hidden" / "nvidia" / "cu13" / "bin" / "nvcc")  # from an isolated build
    monkeypatch.setattr(_nvcc.sysconfig, "get_path", lambda _: str(tmp_path / "hidden"))
    assert _nvcc.find_nvcc() == str(hidden)
    importable = program(tmp_path / "importable" / "nvidia" / "cu13" / "bin" / "nvcc")
    monkeypatch.syspath_prepend(tmp_path / "importable")
    assert _nvcc.find_nvcc() == str(importable)
    monkeypatch.setattr(_nvcc.shutil, "which", lambda name: f"/system/{name}")
    assert _nvcc.find_nvcc() == "/system/nvcc"


@pytest.mark.parametrize(("ci", "said"), [("true", "1 error"), ("", "1 skipped")])
def test_a_missing_nvcc_fails_in_ci_alone(ci, said, tmp_path):
    environ = {**os.environ, "CUDA_HOME": str(tmp_path), "CI": ci}
    test = "tests/test_cuda_compile.py::test_ptx_of_features_no_kernel_uses_yet"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert said in done.stdout and "nvcc was not found" in done.stdout, done.stdout


def test_link_folders_are_nvccs_own(monkeypatch):
    """A toolkit has its libraries in lib64, Python packages have them in lib; nvcc names the former in both."""
    words = '#$ LIBRARIES=  "-L/a b/lib64/stubs" "-L/a b/lib64"\n'
    monkeypatch.setattr(
        _nvcc.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="", stderr=words)
    )
    assert _nvcc.library_folders("nvcc") == ["-L/a b/lib64/stubs", "-L/a b/lib64", "-L/a b/lib"]


def test_find_cxx(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="CXX=no-such-compiler -m64 is not a program: install g"):
        setup_py.find_cxx()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SystemExit, match="and CXX=false fails when asked for its --version"):
        setup_py.find_cxx()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"none of c\+\+, g\+\+ and clang\+\+ is on the PATH, or works"):
        setup_py.find_cxx()
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert setup_py.find_cxx() == "g++"


def test_openmp_is_torchs_own_where_it_brings_one(setup_py, tmp_path):
    assert setup_py.openmp_link_args(tmp_path) == ["-lgomp"]
    (tmp_path / "libgomp-1234.so.1").touch()
    assert setup_py.openmp_link_args(tmp_path) == [str(tmp_path / "libgomp-1234.so.1")]


def test_backend_builds_against_the_installed_torch(backend):
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []


def test_backend_finds_torch_from_inside_an_isolated_build(backend, monkeypatch, tmp_path):
    # pip hides the installed packages in this way from every Python that the build starts
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.path = [p for p in sys.path if 'packages' not in p]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    isolated = [folder for folder in sys.path if not Path(folder, "torch").is_dir()]
    monkeypatch.setattr(sys, "path", list(isolated))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.use_installed_torch()
    assert sys.path[:-1] == isolated  # at the end: the isolated environment's own packages come first
    assert Path(sys.path[-1]) == Path(torch.__file__).parent.parent


def test_backend_asks_for_the_torch_that_pip_will_install(backend, monkeypatch):
    monkeypatch.setattr(backend, "TORCH_FOUND", False)
    monkeypatch.setattr(backend, "run_outside", lambda *_: '{"install": [{"metadata": {"version": "2.12.1+cpu"}}]}')
    assert backend.get_requires_for_build_wheel() == ["torch==2.12.1+cpu"]
    for report in ("", "{}", '{"install": []}'):
        monkeypatch.setattr(backend, "run_outside", lambda *_, report=report: report)
        assert backend.get_requires_for_build_wheel() == [backend.TORCH]


def test_one_minimum_of_torch(backend):
    assert f'dependencies = ["{backend.TORCH}"]' in (ROOT / "pyproject.toml").read_text()
    assert f'"{backend.TORCH}"' in (ROOT / "Makefile").read_text()


def test_version_is_written_once():
    version = rnn_ext.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    metadata = importlib.import_module("importlib.metadata")
    try:
        assert metadata.version("rnn_ext") == version
    except metadata.PackageNotFoundError:
        pytest.skip("rnn_ext is run from its source folder, not installed")


def test_wheel_has_every_package_and_data_file():
    tomllib = pytest.importorskip("tomllib")
    discovery = pytest.importorskip("setuptools").find_namespace_packages
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(discovery(str(ROOT), include=table["tool"]["setuptools"]["packages"]["find"]["include"]))
    globs = table["tool"]["setuptools"]["package-data"]["*"]
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts or path.match("_C.*") or path.name == "_build_info.py":
            continue
        assert ".".join(path.parent.relative_to(PACKAGE.parent).parts) in packages, path
        assert path.suffix == ".py" or any(path.match(glob) for glob in globs), f"{path} would not be in the wheel"


def test_torch_release():
    assert _loader.release("2.13.0+cpu") == _loader.release("2.13.1") == _loader.release("2.13.0a0+git1234") == "2.13"
    assert _loader.release("2.1.0") != _loader.release("2.13.0")


# What a user sees where the library is missing or wrong: one sentence with a command, and torch's kernels still work.

USE = """
import rnn_ext, torch
from rnn_ext import ops
assert not ops.is_available()
lstm = rnn_ext.LSTM(3, 4)
output, _ = lstm(torch.zeros(2, 1, 3))
assert output.shape == (2, 1, 4)
assert "native" in str(rnn_ext.explain(lstm, torch.zeros(2, 1, 3)))
print(ops.load_error())
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package whose library can be spoilt."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "rnn_ext", ignore=shutil.ignore_patterns("__pycache__", "data")))


def load_error(package: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=package.parent, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    assert f"UserWarning: only torch's own kernels can run: {done.stdout.strip()}" in done.stderr
    assert "python -m pip install" in done.stdout
    return done.stdout.strip()


def libraries(package: Path) -> list[Path]:
    found = list(package.glob("_C.*"))
    assert found, "the library has not been built: python -m pip install -e ."
    return found


def test_never_built(package):
    for path in libraries(package):
        path.unlink()
    assert "the C++ library of rnn_ext has not been built; run" in load_error(package)


def test_built_for_another_torch(package):
    info = package / "_build_info.py"
    info.write_text(re.sub(r"(?m)^TORCH_VERSION = .*$", "TORCH_VERSION = '2.5.0+cu999'", info.read_text()))
    assert f"was built for torch 2.5.0+cu999, not for {torch.__version__};" in load_error(package)


def test_library_that_is_no_library(package):
    for path in libraries(package):
        path.unlink()
        path.write_bytes(b"not a library")
    assert re.search(r"cannot be loaded \(.*_C\..*\); run", load_error(package))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_library_that_was_cut_off(package, share):
    """By a full disk or a broken download: loading it would end the process."""
    for path in libraries(package):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
    expected = r"is damaged: _C\..* ends before its last section; run" if share else r"cannot be loaded \("
    assert re.search(expected, load_error(package))


def test_built_for_another_python(package):
    for path in libraries(package):
        path.rename(package / "_C.cpython-37m-x86_64-linux-gnu.so")
    assert "was built for another Python (_C.cpython-37m-x86_64-linux-gnu.so);" in load_error(package)


def test_remedy_names_the_checkout_or_how_to_find_it(monkeypatch, tmp_path):
    monkeypatch.setattr(_loader, "FOLDER", tmp_path / "rnn_ext")
    assert "in rnn_ext's source folder" in _loader.remedy()
    (tmp_path / "setup.py").touch()
    assert _loader.remedy() == f"run: python -m pip install -e {tmp_path}"


def test_importing_brings_little_that_torch_does_not():
    """What costs time there are others' modules: pandas, rich and torch's compiler are imported when they are used."""
    script = "import sys, torch; old = set(sys.modules); import rnn_ext, rnn_ext.ops; print(*set(sys.modules) - old)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    new = printed.split()
    others = {name.split(".")[0] for name in new} - {"rnn_ext", "torch"} - sys.stdlib_module_names
    others -= {"triton"}  # which torch.utils.flop_counter imports where it is
    assert not others
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "torch.export"))]
