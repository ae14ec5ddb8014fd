"""The doctor command: tables for a bug report, and an exit code."""

from pathlib import Path

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import pytest

from mlx_loraplus import doctor
from mlx_loraplus.cli import main
from mlx_loraplus.command_config import DoctorConfig
from mlx_loraplus.training import doctor as checks
from mlx_loraplus.training.doctor_page import to_markdown
from scripts.tiny_model import write_tiny_model
from tests.training.test_selfcheck import wrong_gate


def test_the_tables_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_tiny_model(tmp_path / "model")
    page = tmp_path / "doctor.html"
    main(["doctor", "--model", str(folder), "--save-path", str(page)])
    said, _, last = capsys.readouterr().out.rpartition("the page is ")
    assert last == f"{page}\n"
    text = page.read_text()
    assert '<span class="state correct">correct</span>' in text
    assert text.count('<td data-head="verdict">right</td>') == 4
    assert "model: does it compute correctly?" in text
    assert str(folder) not in text, "a page may be shared"
    for fact in (
        "system",
        "chip",
        "memory",
        "working set",
        "wired limit",
        "BLAS",
        "python",
        "mlx-lm",
    ):
        assert f"\n| {fact} " in said
    assert f"checking {folder}" in said
    assert "\n| mlx-lm's layers" in said
    assert "\n| native attention, composed cross-entropy, eager" in said
    assert said.count("| right ") == 4
    assert said.count("MiB slices") == 6
    assert said.count("| chosen |") == 1
    assert "WRONG" not in said
    assert said.endswith("For a bug report, paste everything above.\n")
    assert "MLX_LORAPLUS_CACHE" not in said

    # Each line of a table has the same width.
    for table in said.split("\n\n"):
        assert len({len(line) for line in table.splitlines() if line.startswith("|")}) <= 1


def test_where_the_page_can_t_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "doctor.html").write_text("mine")
    for name, told in (("doctor.html", "--overwrite"), ("doctor.txt", "must end in .html")):
        with pytest.raises(SystemExit, match="2"):
            doctor.main(["--save-path", str(tmp_path / name)])
        output = capsys.readouterr()
        assert told in output.err
        assert output.out == "", "said at once, not after minutes"
    assert (tmp_path / "doctor.html").read_text() == "mine"

    # With overwrite, the page is replaced.
    monkeypatch.setattr("mlx_loraplus.training.fastest_step.SECONDS", 0.0)
    doctor.main(
        [
            "--model",
            str(write_tiny_model(tmp_path / "model")),
            "--overwrite",
            "--save-path",
            str(tmp_path / "doctor.html"),
        ]
    )
    assert "correct" in (tmp_path / "doctor.html").read_text()


def test_wrong_gradients_are_shown_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("mlx_loraplus.training.fastest_step.SECONDS", 0.0)
    monkeypatch.setattr("mlx_loraplus.kernels.patch._computes", lambda *_: True)
    wrong_gate(monkeypatch, 0.3)
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--model", str(write_tiny_model(tmp_path / "model"))])
    out, err = capsys.readouterr()
    assert out.count("| WRONG ") == 3
    assert "For a bug report" in out
    assert err.startswith("error: this machine computes wrong gradients")


def test_an_unknown_model_is_told(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--model", "gema-3"])
    assert "gemma-3" in capsys.readouterr().err


def test_small_random_models_are_used_where_none_is_stored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "is_stored", lambda _: False)
    monkeypatch.setattr("mlx_loraplus.training.fastest_step.SECONDS", 0.0)
    monkeypatch.setattr("mlx_loraplus.training.selfcheck.LENGTH", 48)
    monkeypatch.setattr("mlx_loraplus.training.selfcheck.TARGETS", 24)
    said: list[str] = []
    checks.examine(DoctorConfig(), said.append)
    text = "\n".join(said)
    assert "checking a small random 4-bit Llama" in text
    assert "checking a small random Gemma 3" in text
    assert text.count("| right ") == 8
    assert text.count("only time to measure 1 way to compute a step; other ways may be faster") == 2


def test_a_table_that_is_wider_than_the_terminal_is_a_list():
    head = ("a step", "seconds", "peak", "")
    way = ", ".join(["chunked attention"] * 4)
    rows = [(way, "1.1", "0.78 GB", "chosen"), ("short", "-", "-", "memory ran out")]
    wide = to_markdown(head, rows)
    assert to_markdown(head, rows, len(wide.splitlines()[0])) == wide
    lines = to_markdown(head, rows, 80).splitlines()
    assert lines[0] == "a step:"
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines[1:-1]) == (
        f"- {way}: seconds 1.1, peak 0.78 GB, chosen"
    )
    assert lines[-1] == "- short: seconds -, peak -, memory ran out"
