"""The list of mistakes that tests must find: it does not rot."""

from __future__ import annotations

from mutants import ROOT, read_list


def test_every_mistake_can_be_planted_and_its_tests_are_there() -> None:
    mutants = read_list()
    assert len(mutants) >= 120 and len(set(mutants)) == len(mutants)
    for mutant in mutants:
        mutant.planted()
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
