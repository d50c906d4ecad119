"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fxexpand.reporting.files import write_whole


def test_text_and_bytes_arrive_and_nothing_else_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "± one")
    write_whole(tmp_path / "b.bin", b"\x00\xff")
    write_whole(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "two"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def broken(source: object, target: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space") as caught:
        write_whole(path, "new")
    assert caught.value.filename == str(path)  # not the draft's
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        write_whole(path, "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link, real = tmp_path / "link.txt", tmp_path / "data" / "real.txt"
    link.symlink_to(real)
    for text in ("one", "two"):
        write_whole(link, text)
        assert link.is_symlink() and real.read_text() == text
    assert list(real.parent.iterdir()) == [real]
