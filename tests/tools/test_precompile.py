"""A compile cache for another machine: filled, packed, unpacked, and every kernel found."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
from lorakernels import cli
from lorakernels.tools import precompile

ONE_KERNEL = """
import torch
from lorakernels.testing import driver
driver.install("sm_90")
from lorakernels.kernels.tiles import sum_planes
sum_planes(torch.empty(2, 64), torch.empty(64))
"""

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the driver that checks is built with a C compiler")


@pytest.mark.slow
def test_a_kernel_is_found_where_it_is_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache.tar.xz"
    assert cli.main(["precompile", "--out", str(out), "--", sys.executable, "-c", ONE_KERNEL]) == 0
    printed = capsys.readouterr().out
    assert "1 kernels for sm_90" in printed and "1 found, 0 compiled anew" in printed
    with tarfile.open(out) as tar:
        names = tar.getnames()
        assert all(name.endswith((".json", ".cubin", ".so")) for name in names)
        manifest = json.load(tar.extractfile("lorakernels.json"))  # type: ignore[arg-type]
    assert manifest["python"] == sys.implementation.cache_tag
    assert precompile.unpack(out, tmp_path / "here") is None
    before = {path: path.stat().st_ino for path in (tmp_path / "here").rglob("*.so")}
    assert precompile.unpack(out, tmp_path / "here") is None  # over what may be loaded from there
    assert before and all(path.stat().st_ino != inode for path, inode in before.items())
    (group,) = (tmp_path / "here").glob("*/__grp__*")
    paths = json.loads(group.read_text())["child_paths"].values()
    assert paths and all(Path(path).exists() for path in paths)


@pytest.mark.slow
def test_a_command_that_fails_keeps_what_it_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["precompile", "--out", str(tmp_path / "cache.tar.xz"), "--work", str(tmp_path / "work")]
    assert cli.main([*arguments, sys.executable, "-c", ONE_KERNEL + "raise SystemExit(3)"]) == 1
    printed = capsys.readouterr().out
    assert "ended with status 3" in printed and "1 kernels for sm_90" in printed
    assert cli.main([*arguments, sys.executable, "-c", ONE_KERNEL]) == 0
    log = (tmp_path / "work" / "cache.log").read_text()
    assert log == "hit sum_planes_kernel\n"  # from the first call


@pytest.mark.slow
def test_a_command_that_launches_nothing_is_a_failure(tmp_path: Path) -> None:
    out = str(tmp_path / "cache.tar.xz")
    assert cli.main(["precompile", "--out", out, sys.executable, "-c", "pass"]) == 1
    assert cli.main(["precompile", "--out", out, sys.executable, "-c", "raise SystemExit(3)"]) == 1


def test_what_is_made_for_another_machine_says_so(tmp_path: Path) -> None:
    manifest = tmp_path / "lorakernels.json"
    manifest.write_text(json.dumps({"arch": "sm_90", "key": "other", "python": "cpython-312", "triton": "3.6.0"}))
    archive = tmp_path / "cache.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(manifest, manifest.name)
    assert "it is for triton 3.6.0 on cpython-312, and this is" in str(precompile.unpack(archive, tmp_path / "here"))


def test_no_archive(tmp_path: Path) -> None:
    for name, content in (("none.tar.xz", None), ("text.tar.xz", b"text")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is no archive of lorakernels precompile"):
            precompile.unpack(tmp_path / name, tmp_path / "here")


def test_no_such_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["precompile", "--out", str(tmp_path / "cache.tar.xz"), "--python", "pypy"]) == 2
    assert "expected a tag such as cp312, or the path of a Python program" in capsys.readouterr().err
