"""The list of all numbers: every stored result has a command that makes it, and its commit is found."""

import json
from pathlib import Path

from scripts.all_numbers import PARTS, ROOT, origin, places_of

STORED = {
    str(file.relative_to(ROOT / "scripts"))
    for file in (ROOT / "scripts").glob("*/results/*.json*")
    if "before_after" not in file.name  # two commits of the user's choice
}


def test_every_stored_result_has_a_command_that_exists():
    listed = [file for part in PARTS for file in part.results]
    assert set(listed) >= STORED
    assert len(listed) == len(set(listed))
    for part in PARTS:
        words = part.command.removeprefix(".venv/bin/python ").split()
        assert (ROOT / words[0]).is_file(), part.name
        assert set(places_of(part.command)) <= {
            "wikisql",
            "chat",
            "text",
            "templates",
            "judge",
            "vllm",
            "node",
            "scratch",
        }


def test_the_oldest_result_of_a_file_counts(tmp_path: Path):
    old, new = [
        {"commit": "0000000", "date": "2026-01-01"},
        {"commit": "HEAD", "date": "2026-02-01"},
    ]
    (tmp_path / "several.json").write_text(json.dumps({"cases": [new, {"made": old}]}))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (new, old)))
    (tmp_path / "none.json").write_text("{}")
    assert origin(tmp_path / "several.json").commit == "0000000"
    assert origin(tmp_path / "lines.jsonl").date == "2026-01-01"
    assert not origin(tmp_path / "lines.jsonl").is_current
    assert origin(tmp_path / "none.json").commit == ""
    assert origin(tmp_path / "missing.json").commit == ""
