"""Text for calibration and evaluation: reading documents, and cutting token windows from them."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, MissingError
from losa_deploy.text.tokenizer import Tokenizer

TEXT_FIELDS = ("text", "story")
INSTRUCTION_FIELDS = ("instruction", "input", "output")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
EXPECTED = ".txt, .jsonl, .jsonl.gz or .parquet"


def read_documents(path: Path) -> list[str]:
    """All documents of a file, or of the files in a folder (sorted by name, subfolders included).

    A .txt file is one document; each line of a .jsonl(.gz) and each row of a .parquet is one: its
    `text` or `story`, or `instruction`, `input` and `output` joined by newlines. Blank documents are
    left out. Raises `InputError` naming file, line and the fields found, `MissingError` if a
    .parquet file cannot be read without pyarrow.
    """
    files = _text_files(path)
    documents = [text for file in files for text in _read_file(file) if text.strip()]
    if not documents:
        raise InputError(
            f"{path} holds no text ({len(files)} file{'s' if len(files) != 1 else ''} read).",
            hint=f"Give a {EXPECTED} file that is not empty.",
        )
    return documents


def read_rows(path: Path) -> list[str]:
    """The text of every row of one file, blank rows included; formats and errors as in `read_documents`."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.", hint=f"Give a {EXPECTED} file.")
    return list(_read_file(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line of a .jsonl(.gz) file that is not blank."""
    for number, line in enumerate(_decode(path, _read_bytes(path)).split("\n"), start=1):
        if line.strip():
            yield number, line


def text_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of the files that `read_documents` would read for each of `paths`.

    Two texts of equal digest give equal documents; how a folder happens to be listed changes nothing.
    Raises `InputError` if a path does not exist or a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in _text_files(path):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(file, error) from None
            digest.update(f"{content} {name}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()


def token_windows(
    tokenizer: Tokenizer, documents: Sequence[str], length: int, samples: int, seed: int
) -> NDArray[np.int64]:
    """[samples, length] token ids: a seeded choice of non-overlapping windows, in text order.

    The documents are put one after the other with the end token between them. Raises `InputError`
    with the counts if there are fewer than `samples` windows.
    """
    stream = token_stream(tokenizer, documents)
    available = len(stream) // length
    if available < samples:
        raise InputError(
            f"The text has {len(stream)} tokens, enough for {available} windows of {length}; "
            f"{samples} are asked for ({samples * length} tokens).",
            hint="Give more text, or lower the number of samples or the sequence length.",
            details={"tokens": len(stream), "windows": available, "samples": samples, "length": length},
        )
    chosen = np.sort(np.random.default_rng(seed).choice(available, size=samples, replace=False))
    return stream[: available * length].reshape(available, length)[chosen]


def token_stream(tokenizer: Tokenizer, documents: Iterable[str]) -> NDArray[np.int64]:
    """[n] token ids of the documents, with the end token (if there is one) between them."""
    separator = tokenizer.separator_id
    ids: list[int] = []
    for document in documents:
        if ids and separator is not None:
            ids.append(separator)
        ids += tokenizer.encode(document, special=False)
    return np.array(ids, np.int64)


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder, in the order they are read."""
    if not path.exists():
        raise InputError(f"{path} does not exist.", hint=f"Give a {EXPECTED} file, or a folder of them.")
    return _files_below(path) if path.is_dir() else [path]


def _files_below(folder: Path) -> list[Path]:
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name.endswith(SUFFIXES) and not p.name.startswith(".")
    )
    if not files:
        raise InputError(f"{folder} has no {EXPECTED} file.", hint="Give a folder with text files.")
    return files


def _read_file(path: Path) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".txt":
        return iter([_decode(path, _read_bytes(path))])
    raise InputError(f"{path} is not a text file this command knows.", hint=f"Expected {EXPECTED}.")


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} is not a complete gzip file: {error}.", hint="Copy the file again."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}.", hint="Check the file.")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start}).",
            hint="Convert it, e.g. with `iconv -f LATIN1 -t UTF-8`.",
        ) from None


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where} is not valid JSON: {error}.", hint="Expected one JSON object per line."
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{where} holds a JSON {type(row).__name__}, expected an object.",
                hint='Write each document as {"text": "…"}.',
            )
        yield _text_of(row, where)


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingError(
            f"{path} is a Parquet file, and pyarrow is not installed.",
            hint="Run `pip install pyarrow`, or give the text as .jsonl or .txt.",
        ) from None
    try:
        rows = parquet.read_table(str(path)).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}.", hint="Copy the file again.") from None
    for number, row in enumerate(rows):
        yield _text_of(row, f"{path}, row {number}")


def _text_of(row: Mapping[str, object], where: str) -> str:
    """The text of one record."""
    for field in TEXT_FIELDS:
        value = row.get(field)
        if isinstance(value, str):
            return value
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        parts = [row.get(field) for field in INSTRUCTION_FIELDS]
        return "\n".join(part for part in parts if isinstance(part, str) and part)
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
    raise InputError(
        f"{where} has no text; fields found: {found}.",
        hint="Expected a string field `text` or `story`, or `instruction` and `output`.",
    )
