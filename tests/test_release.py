"""What would be released: nothing in wheel or sdist that git does not have, and it starts where nothing else is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lorakernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NAME = f"lorakernels-{lorakernels.__version__}"


def output(*command: object, cwd: Path = ROOT) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("build", "twine"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install -e ".[release]"')
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so nobody knows what belongs to it")
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


def test_what_is_in_them(built: Path) -> None:
    tracked = set(output("git", "ls-files").splitlines())
    wheel = set(zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl").namelist())
    package = {name for name in wheel if not name.startswith(f"{NAME}.dist-info/")}
    assert package == {name for name in tracked if name.startswith("lorakernels/")}
    assert f"{NAME}.dist-info/licenses/LICENSE" in wheel
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        assert {member.name.removeprefix(f"{NAME}/") for member in sdist} == tracked | {"PKG-INFO"}
    assert output(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()).count("PASSED") == 2


def test_it_starts_where_nothing_else_is(built: Path, tmp_path: Path) -> None:
    """`import lorakernels` and `--help` need no torch."""
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    wheel = built / f"{NAME}-py3-none-any.whl"
    output(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    code = "import lorakernels; print(lorakernels.__version__, lorakernels.__file__)"
    where = output(python, "-I", "-c", code, cwd=tmp_path)
    assert where.split()[0] == lorakernels.__version__ and str(tmp_path) in where
    command = tmp_path / "empty" / "bin" / "lorakernels"
    assert "compile-report" in output(python, "-I", command, "--help", cwd=tmp_path)
