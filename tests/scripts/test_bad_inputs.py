"""The script that gives bad inputs to the commands notices each way in which a case can go wrong."""

import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.stress.bad_inputs import Case, all_cases, lines_of, problems_of, run_case, write_files
from scripts.stress.models import MODELS

REFUSAL = Case("a refusal", "train", shows=("rows.jsonl:1",))


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (2, "loading x\nerror: rows.jsonl:1: bad\n", ""),
        (0, "error: rows.jsonl:1: bad\n", "exit code 0 instead of 2"),
        (2, "Traceback (most\nerror: rows.jsonl:1: bad\n", "a traceback"),
        (2, "rows.jsonl:1: bad\n", "0 lines begin with error: "),
        (2, "", "0 lines begin with error: "),
        (2, "error: rows.jsonl:1\nerror: more\n", "2 lines begin with error: "),
        (2, "error: rows.jsonl:1\nmore\n", "the error is not the last line"),
        (2, "error: bad\n", "the output does not contain 'rows.jsonl:1'"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, code: int, output: str, problem: str) -> None:
    found = problems_of(REFUSAL, code, output, tmp_path)
    assert (found == []) == (problem == "")
    assert not problem or problem in found


def test_what_a_refusal_leaves_behind_is_found(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert problems_of(REFUSAL, 2, "error: rows.jsonl:1\n", tmp_path) == ["run exists"]


def test_a_case_runs_and_its_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    case = Case(
        "no data", "train --data nowhere.jsonl --adapter-path run", shows=("nowhere.jsonl",)
    )
    assert run_case(case, tmp_path / "case")["wrong"] == []

    write_files(tmp_path, {"a/rows.jsonl": [{"text": "ü"}], "a/link": "-> rows.jsonl"})
    assert (tmp_path / "a" / "link").read_text() == '{"text": "ü"}\n'
    assert lines_of("one \n\nend\n") == ["one", "end"]


def test_cases_have_names_of_their_own_and_models_that_exist() -> None:
    cases = all_cases()
    assert not [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    named = set(re.findall(r"models/([\w-]+)", " ".join(case.commands for case in cases)))
    assert named == set(MODELS)
