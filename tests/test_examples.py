"""Every example runs: each asserts what it claims. So does the code in the documents, whose links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
WITH_CODE = ["README.md", "docs/guide.md"]
DOCUMENTS = [*WITH_CODE, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md"]


def test_found():
    assert len(EXAMPLES) >= 7


def run(script, folder, warnings):
    """What a user's file prints, run in an empty folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", warnings, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs(example, tmp_path):
    assert run(example, tmp_path, "error").strip()  # it tells its reader something


def code_of(document):
    """Its blocks of Python, one after the other."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    return "\n".join(blocks)


@pytest.mark.parametrize("document", WITH_CODE)
def test_code_of_documents_runs(document, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "empty"
    script.write_text(code_of(document), encoding="utf-8")
    folder.mkdir()
    run(script, folder, "ignore")  # torch.compile imports what torch has deprecated


def anchors_of(text):
    """Of its headings, as they are shown on the web."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


def test_index_names_them_all():
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [f"`{path.name}`" in index for path in EXAMPLES] == [True] * len(EXAMPLES)
