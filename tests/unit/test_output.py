"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from losa_deploy.errors import GateError, ResourceError, UsageError
from losa_deploy.output import check_output, require_disk, shortage_error, sibling, staged_output


def write(
    output: Path, text: str = "new", *, overwrite: bool = False, fail: BaseException | None = None
) -> None:
    with staged_output(output, overwrite=overwrite) as folder:
        assert folder != output.absolute()
        assert not list(folder.iterdir())
        (folder / "losa.json").write_text(text)
        if fail is not None:
            raise fail


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_success_leaves_the_output_alone(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == {"out"}
    assert (tmp_path / "deep" / "out" / "losa.json").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", fail=error)
    assert names(tmp_path) == set()


def test_a_failed_gate_keeps_the_artifact_and_replaces_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("first", "second"):
        gate = GateError("no parity")
        with pytest.raises(GateError):
            write(out, text, fail=gate)
        assert gate.details["kept"] == str(tmp_path / "out.failed")
    assert names(tmp_path) == {"out.failed"}
    assert (tmp_path / "out.failed" / "losa.json").read_text() == "second"


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(UsageError, match="--overwrite"), staged_output(out, overwrite=False):
        pytest.fail("work was done")
    assert (out / "losa.json").read_text() == "old"


def test_overwrite_replaces_ours_and_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for text in ("old", "new"):
        write(out, text, overwrite=True)
        assert (out / "losa.json").read_text() == text
    assert names(tmp_path) == {"out"}


def test_the_old_output_survives_a_failed_new_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    for error in (KeyboardInterrupt(), GateError("no parity")):
        with pytest.raises(type(error)):
            write(out, "new", overwrite=True, fail=error)
        assert (out / "losa.json").read_text() == "old"


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("ten years of work")


def a_file(path: Path) -> None:
    path.write_text("ten years of work")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_folder, a_file, a_dangling_link])
def test_what_is_not_ours_is_never_deleted(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    before = names(tmp_path)
    with pytest.raises(UsageError):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == before


def test_a_stale_partial_is_replaced_and_a_link_not_followed(tmp_path: Path) -> None:
    a_folder(tmp_path / "precious")
    sibling(tmp_path / "out", ".partial").symlink_to(tmp_path / "precious")
    write(tmp_path / "out")
    assert names(tmp_path) == {"precious", "out"}
    assert names(tmp_path / "precious") == {"thesis.txt"}


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResourceError):
        write(tmp_path / "out", fail=full)
    assert names(tmp_path) == set()


def test_shortages_are_recognised_in_the_words_of_libraries() -> None:
    texts = ('IoError(Os { code: 28, message: "No space left on device" })', "can't allocate memory: 9 bytes")
    assert all(isinstance(shortage_error(RuntimeError(text)), ResourceError) for text in texts)
    assert shortage_error(RuntimeError("shapes differ")) is None
    assert shortage_error(OSError(errno.ENOENT, "No such file")) is None


def test_disk_is_checked_against_the_need(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there" / "yet", 1, "Nothing")
    with pytest.raises(ResourceError, match="The model needs") as caught:
        require_disk(tmp_path / "out", 1 << 60, "The model")
    assert caught.value.details["needed_bytes"] == 1 << 60


def test_check_output_accepts_a_new_path(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
