"""The session on a GPU: its parts on a tiny model and a CPU, and what becomes of parts that fail or take too long."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_loraplus.device import on_gpu
from scripts import gpu
from scripts.gpu import Options, choose_parts, run_part, run_session


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "work").mkdir()
    return Options("any", True, 4, str(tmp_path / "work"))


def test_a_session_writes_one_file(options: Options, tmp_path: Path):
    output = tmp_path / "gpu.json"
    run_session(options, ["machine", "demo"], 480, output)
    written = json.loads(output.read_text())
    assert written["format"] == gpu.FORMAT
    assert {"mlx", "mlx-lm"} <= set(written["versions"])
    assert [part["status"] for part in written["parts"].values()] == ["done"] * 2
    assert str(tmp_path) not in output.read_text()

    machine, demo = (part["result"] for part in written["parts"].values())
    assert machine["weights"] == "float32"
    assert (demo["asked"], demo["exact_before"]) == (6, 0)
    assert len(demo["losses"]) >= 1


def test_a_part_that_fails_is_recorded_and_not_fatal(options: Options, tmp_path: Path):
    record = run_part("fuse", options, 400, 60)  # there is no model and no adapter
    assert record["status"] == "failed"
    assert record["error"]


def test_a_part_that_takes_too_long_is_ended(options: Options):
    record = run_part("demo", options, 400, 0.01)
    assert record["status"] == "timed out"
    assert record["seconds"] < 20


def test_what_no_longer_fits_is_skipped(options: Options):
    record = run_part("demo", options, 12, 60)
    assert record == {"status": "skipped", "error": "12 s are left and it needs 30"}


@pytest.mark.skipif(on_gpu(), reason="this is a GPU")
def test_a_cpu_is_refused_without_being_asked_for(options: Options, tmp_path: Path):
    result = run_session(
        replace(options, device="gpu"), list(gpu.PARTS), 480, tmp_path / "gpu.json"
    )
    assert list(result["parts"]) == ["machine"]
    assert (
        "MLX has no GPU here; --device any runs this on the CPU"
        in result["parts"]["machine"]["error"]
    )


def test_parts_are_chosen_by_name(options: Options):
    assert choose_parts(options, "packed") == ["machine", "demo", "packed"]
    assert "bench a ours" not in choose_parts(options, None)
    assert "bench a ours" in choose_parts(replace(options, tiny=False), None)
    with pytest.raises(SystemExit, match="no part fused; there are machine, doctor, demo"):
        choose_parts(options, "fused")


def test_all_parts_fit_into_the_time():
    """The limits of all parts together are longer; what each needs at least is not."""
    assert sum(part.least for part in gpu.PARTS.values()) < gpu.LIMIT == 480


ROOT = Path(__file__).parents[2]


def test_the_workflow_runs_it_on_a_mac_and_fails_if_its_file_is_lost():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["metal"]
    assert job["runs-on"].startswith("macos-")
    (written,) = [
        step["run"].split("--output ")[1]
        for step in job["steps"]
        if step.get("run", "").startswith("scripts/gpu ")
    ]
    (kept,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert kept["if"] == "always()", "also if a part has failed"
    assert kept["with"]["path"] == written
    assert kept["with"]["if-no-files-found"] == "error"


def test_the_page_and_the_form_tell_a_mac_owner_how_to_send_the_file():
    page = (ROOT / "docs" / "metal.md").read_text(encoding="utf-8")
    section = page.split("\n## Send us your results\n")[1].split("\n## ")[0]
    form: dict[str, Any] = yaml.safe_load(
        (ROOT / ".github" / "ISSUE_TEMPLATE" / "2_gpu.yml").read_text()
    )
    assert "```bash\nscripts/gpu " in section
    assert f'form "{form["name"]}"' in section
    assert "at most eight minutes" in section
    assert gpu.LIMIT == 8 * 60

    # The page explains every part, and nothing else.
    explained = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)? \|", section, flags=re.MULTILINE)
    names = [name.removesuffix(" …") for row in explained for name in row if name]
    parts = dict.fromkeys(re.sub(r"^(bench .) .*", r"\1", name) for name in gpu.PARTS)
    assert names == list(parts)

    # The form asks for the file that the script writes by default.
    (field,) = [each for each in form["body"] if each["id"] == "file"]
    assert field["attributes"]["label"] == "gpu.json"
    assert (
        "`scripts/gpu` (at most eight minutes) and attach the file"
        in (field["attributes"]["description"])
    )
    assert field["validations"]["required"]
    assert "`gpu.json`" in section
