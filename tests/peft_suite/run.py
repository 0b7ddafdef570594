"""PEFT's own tests of LoRA, accelerated; what fails then is run with PEFT as it is, where it must fail too.

    pip install -e ".[peft-suite]"
    python tests/peft_suite/run.py

The tests come from the source package of the PEFT that is installed, by `pip download`. Left out are the tests of other
methods (the plugin drops them by the config class in their id) and the files that need a GPU, a quantisation library or
models from the hub; single tests that need the hub fail in both runs.
The exit status is 1 if a test passes plain and not accelerated, or if too few calls took the fused path to say much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SELECTION = (
    "tests/test_custom_models.py",
    "tests/test_lora_variants.py",
    "tests/test_initialization.py",
    "tests/test_low_level_api.py",
    "tests/test_tuners_utils.py::TestModelAndLayerStatus",
    "tests/test_tuners_utils.py::TestRankAndAlphaPattern",
)
# Left out for their time alone: over 40 s each.
TOO_SLOW = (
    "test_trainable_token_indices_targets_head_and_embedding",
    "test_nemotron_h_has_defaults_and_blocks_mamba_modules",
)
MIN_FUSED_CALLS = 1000


@dataclass(frozen=True)
class Result:
    outcomes: dict[str, str]
    counts: Counter[str]
    seconds: float

    @property
    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}


def fetch(folder: Path) -> Path:
    """The unpacked `tests` of the source package of the installed PEFT, in `folder`."""
    release = f"peft=={version('peft')}"
    download = [sys.executable, "-m", "pip", "download", "-q", release, "--no-binary", "peft", "--no-deps"]
    subprocess.run([*download, "-d", str(folder)], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and "/tests/" in member.name]
        for member in members:
            member.name = member.name.partition("/")[2]
            tar.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()  # the tests import each other relatively; the package lacks it
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # not PEFT's own, which measures coverage
    return folder / "tests"


def run(tests: Path, out: Path, accelerate: bool, workers: int, selection: Sequence[str]) -> Result:
    out.mkdir()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "PEFT_SUITE_OUT": str(out),
        "PEFT_SUITE_ACCELERATE": str(int(accelerate)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--timeout=300", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-p", "peft_suite_plugin", "-n", str(workers), "--dist", "worksteal"]
    command += ["-k", " and ".join(f"not {name}" for name in TOO_SLOW), *selection]
    start = time.perf_counter()
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=tests.parent, env=environment, stdout=log, stderr=log, check=False)
    seconds = time.perf_counter() - start

    outcomes: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for file in out.glob("*.json"):  # of each process
        part = json.loads(file.read_text(encoding="utf-8"))
        outcomes |= part["outcomes"]
        counts.update(part["counts"])
    return Result(outcomes, counts, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of pytest-xdist")
    parser.add_argument("--keep", type=Path, help="a new folder for the sources and the logs, kept afterwards")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        tests = fetch(folder)
        fast = run(tests, folder / "accelerated", True, options.workers, SELECTION)
        failed = sorted(test for test, outcome in fast.outcomes.items() if outcome not in ("passed", "skipped"))
        plain = run(tests, folder / "plain", False, options.workers, failed) if failed else Result({}, Counter(), 0.0)
        regressed = sorted(plain.passed)
        for name, result in (("accelerated", fast), ("of these, plain, what failed", plain)):
            print(f"{name}: {dict(Counter(result.outcomes.values()))}, {result.seconds:.0f} s")
        print(f"layers accelerated: {fast.counts['layers']}")
        print(f"their calls: {fast.counts['calls']}, of these on the fused path: {fast.counts['fused calls']}")
        for test in regressed:
            print(f"passes plain, not accelerated ({fast.outcomes[test]}): {test}")
        too_few = fast.counts["fused calls"] < MIN_FUSED_CALLS
        if too_few:
            print(f"fewer than {MIN_FUSED_CALLS} calls took the fused path: this run says little")
        if regressed or too_few:
            print((folder / "accelerated" / "log.txt").read_text(encoding="utf-8")[-20_000:])
    return int(bool(regressed) or too_few)


if __name__ == "__main__":
    sys.exit(main())
