"""tests/mutants: every patch fits the sources, and the verdicts are right."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich")

from tests.mutants import run

PATCHES = sorted(run.HERE.glob("*.patch"))


def test_there_are_enough_mutants_everywhere():
    files = [run.read(patch).file for patch in PATCHES]
    assert len(files) >= 40
    for place in ("rnn_ext/", "csrc/ops/", "csrc/cpu/", "csrc/cuda/", "csrc/cells/"):
        assert sum(file.startswith(place) for file in files) >= 3, place


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_mutant_fits_the_sources(patch: Path):
    mutant = run.read(patch)
    run.apply(mutant, run.ROOT, "--check")
    for test in mutant.tests:
        assert (run.ROOT / test.partition("::")[0]).is_file(), test


@pytest.mark.parametrize(
    ("body", "outcome", "why"),
    [
        ("assert True", "survived", "test_it.py passed"),
        ("assert False", "killed", "test_it.py::test_it"),
        ("import os; os.abort()", "killed", "test_it.py::test_it"),
        ("import time; time.sleep(100)", "killed", "no end"),
        (")", "broken", "SyntaxError"),
    ],
)
def test_verdict(tmp_path: Path, body: str, outcome: str, why: str):
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    verdict = run.judge(["test_it.py"], tmp_path, 8)
    assert verdict.outcome == outcome and why in verdict.why


def test_mutant_that_does_not_fit_is_broken(tmp_path: Path):
    clean = tmp_path / "clean"
    (clean / "rnn_ext").mkdir(parents=True)
    mutant = next(mutant for mutant in map(run.read, PATCHES) if mutant.file == "rnn_ext/functional.py")
    verdict = run.attempt(mutant, clean, tmp_path / "tree")
    assert verdict.outcome == "broken" and "does not apply" in verdict.why


def test_patch_without_a_head_is_refused(tmp_path: Path):
    patch = tmp_path / "no_head.patch"
    patch.write_text("--- a/x\n+++ b/x\n")
    with pytest.raises(ValueError, match="Fault"):
        run.read(patch)
