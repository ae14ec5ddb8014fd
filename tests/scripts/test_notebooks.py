"""The notebooks end to end on a tiny model, and what a notebook shows while a run goes."""

from pathlib import Path

import pytest

from scripts.tiny_model import write_tiny_model

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOKS = Path(__file__).parents[2] / "scripts" / "notebooks"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model in it, where the kernels of notebooks begin."""
    write_tiny_model(tmp_path / "tiny")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parents[1]))
    return tmp_path


def execute(notebook, here: Path):
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(here)}}
    ).execute()
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


@pytest.mark.parametrize("name", ["quickstart", "lora_plus"])
def test_the_notebooks_run(here: Path, name: str):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for long, short in (
            ('"gemma-3"', '"tiny"'),
            ("iters=38", "iters=4"),
            ("iters=20", "iters=4"),
            ("eval=", "eval=2 + 0*"),
        ):
            cell.source = cell.source.replace(long, short)
    outputs = execute(notebook, here)
    pages = [
        output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})
    ]
    assert any("<svg" in page for page in pages)
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    if name == "quickstart":
        shown = [output for output in outputs if output.output_type == "display_data"]
        assert len(shown) == 1, "one picture, updated in place"
        assert "step 4 of 4" in shown[0].data["text/plain"], "it stands at the end, in text too"
        assert (here / "quickstart-run" / "report.html").is_file()


def test_interrupting_a_cell_leaves_a_usable_model_and_a_run_that_goes_on(here: Path):
    cells = [
        (
            "import os, signal\nimport mlx_loraplus as ml\nmodel, tokenizer ="
            " ml.load('tiny')\nsettings = dict(iters=4, batch_size=2, warmup=1, steps_per_report=1,"
            " sample_rows=0, adapter_path='run')\ndef interrupt(run, event):\n    if 'loss' in"
            " event and event['step'] == 2:\n        os.kill(os.getpid(), signal.SIGINT)\nrun ="
            " ml.finetune(model, tokenizer, callback=interrupt, **settings)\nprint(run.outcome,"
            " run.progress.step, len(ml.complete(model, tokenizer, '1 +', max_tokens=3)) > 0)"
        ),
        (
            "print(ml.finetune(model, tokenizer, callback=lambda run, event: None, resume=True,"
            " **settings).outcome)"
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    outputs = execute(notebook, here)
    warned, *others = [output.text.strip() for output in outputs]
    assert warned.startswith("warning: no data given, so the built-in demo set is used")
    assert others == ["interrupted 2 True", "finished"]
