"""Reading documents and cutting token windows."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.errors import InputError, MissingError
from losa_deploy.text.corpus import read_documents, read_rows, text_digest, token_stream, token_windows
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def write_lines(path: Path, rows: list[object]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne.\n\nTwo é.".encode())
    assert read_documents(path) == ["One.\n\nTwo é."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_fields_of_json_lines(tmp_path: Path, name: str) -> None:
    rows: list[object] = [
        {"text": "first", "story": "ignored"},
        {"story": "second"},
        {"instruction": "ask", "input": "about", "output": "answer"},
        {"instruction": "ask", "input": "", "output": "answer"},
        {"text": "  "},
    ]
    found = read_documents(write_lines(tmp_path / name, rows))
    assert found == ["first", "second", "ask\nabout\nanswer", "ask\nanswer"]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "c.txt").write_text("c")
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "sub" / "a.jsonl.gz", [{"text": "a"}])
    (tmp_path / "README.md").write_text("not text for this purpose")
    (tmp_path / ".hidden.txt").write_text("not this either")
    assert read_documents(tmp_path) == ["b", "c", "a"]


def test_the_digest_follows_contents_not_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, single = tmp_path / "folder", tmp_path / "one.txt"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (folder / name).write_text(name)
    single.write_text("one")
    before = text_digest([folder, single])
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert text_digest([folder, single]) == before
    (folder / "notes.md").write_text("no text for this purpose")
    assert text_digest([folder, single]) == before
    assert text_digest([single, folder]) != before, "the first text is for something else than the second"
    (folder / "sub" / "c.txt").write_text("changed")
    changed = text_digest([folder, single])
    (folder / "sub" / "c.txt").rename(folder / "0.txt")
    assert len({before, changed, text_digest([folder, single])}) == 3
    with pytest.raises(InputError, match=r"absent\.txt does not exist"):
        text_digest([tmp_path / "absent.txt"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"abc\xff", "0xff at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("a.jsonl", b'["text"]', "line 1 holds a JSON list"),
        ("a.jsonl", b'{"body": "x", "n": 3}', r"fields found: body \(str\), n \(int\)"),
        ("a.jsonl", b'{"text": 3}', r"fields found: text \(int\)"),
        ("a.jsonl.gz", b"plain", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}', mtime=0)[:-9], "not a complete gzip file"),
        ("a.csv", b"a,b", "not a text file"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_documents(path)
    assert str(path) in error.value.message
    assert error.value.hint


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no \.txt"):
        read_documents(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingError, match="pyarrow"):
        read_documents(tmp_path)


def test_parquet_with_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert read_documents(tmp_path) == ["a", "b"]


def test_rows_keep_the_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}\n')
    assert read_rows(tmp_path / "a.jsonl") == ["a", "", "b"]
    assert read_documents(tmp_path / "a.jsonl") == ["a", "b"]
    with pytest.raises(InputError, match="There is no file"):
        read_rows(tmp_path / "b.jsonl")


def test_documents_are_separated(tokenizer: Tokenizer) -> None:
    stream = token_stream(tokenizer, ["ab", "cd"])
    assert stream.tolist() == [*tokenizer.encode("ab"), tokenizer.eos_ids[0], *tokenizer.encode("cd")]


def test_windows_are_distinct_pieces_of_the_text(tokenizer: Tokenizer) -> None:
    documents = [" ".join(str(n) for n in range(2000))]  # no piece of it occurs twice
    stream = token_stream(tokenizer, documents)
    windows = token_windows(tokenizer, documents, length=50, samples=20, seed=3)
    assert windows.shape == (20, 50) and windows.dtype == np.int64
    grid = stream[: len(stream) // 50 * 50].reshape(-1, 50).tolist()
    places = [grid.index(window) for window in windows.tolist()]
    assert places == sorted(set(places))
    assert np.array_equal(windows, token_windows(tokenizer, documents, length=50, samples=20, seed=3))
    assert not np.array_equal(windows, token_windows(tokenizer, documents, length=50, samples=20, seed=4))


def test_all_windows_are_the_whole_text(tokenizer: Tokenizer, tiny_text: str) -> None:
    stream = token_stream(tokenizer, [tiny_text])
    count = len(stream) // 64
    windows = token_windows(tokenizer, [tiny_text], length=64, samples=count, seed=0)
    assert windows.reshape(-1).tolist() == stream[: count * 64].tolist()


def test_too_little_text(tokenizer: Tokenizer) -> None:
    tokens = len(tokenizer.encode("abc " * 10))
    with pytest.raises(InputError, match=f"has {tokens} tokens, enough for {tokens // 8} windows of 8; 99"):
        token_windows(tokenizer, ["abc " * 10], length=8, samples=99, seed=0)
