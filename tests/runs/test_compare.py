"""Runs side by side."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import mlx_loraplus as ml
from mlx_loraplus.compare import main
from tests.training.tiny_runs import Place


def test_what_differs_and_what_came_of_it(place: Place):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    rows = dict(found.rows)
    assert rows["lr_ratio"] == ["1.0", "4.0"]
    assert rows.keys().isdisjoint({"learning_rate", "train", "adapter", "model"}), (
        "what is the same"
    )
    assert rows["outcome"] == ["finished", "finished"]
    assert found.names == ["plain", "plus"]
    html = found._repr_html_()
    assert html.count("<figure>") == 6
    assert "lr_ratio" in html
    figure = found.plot("loss")
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False, False]
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    minutes = figure.axes[2].lines[1].get_xdata()
    run = found.runs[1]
    assert minutes[-1] == pytest.approx(
        sum(event["seconds"] for event in run.history if "loss" in event) / 60
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "tokens", "minutes"]


def test_the_headline_names_the_lowest_loss_and_the_most_exact_answers(place: Place):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    best = min(found.runs, key=lambda run: run.verdict.after or 9.0)
    assert found.headline().lead.endswith(f"is that of {best.name}.")
    for event in found.runs[0].history:
        if "answers" in event:
            event["answers"] = [prompt["expected"] for prompt in found.runs[0].start["prompts"]]
    assert found.headline().lead.endswith(
        "The most exact sample answers, 3 of 3, are those of plain."
    )


@pytest.mark.parametrize("width", [20, 59, 60])
def test_a_narrow_terminal_loses_nothing(place: Place, width: int):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    shown = console.file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    assert ("│" in shown) == (width == 60)
    for name, cells in found.rows:
        assert name in shown
        told = [f"{run}: {cell}" for run, cell in zip(found.names, cells, strict=True)]
        assert width == 60 or all("".join(line.split()) in "".join(shown.split()) for line in told)


def test_the_best_and_the_answers_are_marked(place: Place):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    losses = [run.verdict.after for run in found.runs]
    best = losses.index(min(losses))
    assert found.best["validation loss"] == {best}
    assert "outcome" not in found.best
    row = next(line for line in str(found).splitlines() if "validation loss" in line)
    assert [" *" in cell for cell in row.split("│")[2:4]] == [best == 0, best == 1]
    assert "* the best" in str(found)
    assert str(found).count("├") == 1, "one line divides the results from the settings"

    # The results come first, then what differs, then the answers to the prompts of both runs.
    headings = [section.heading for section in found.sections()]
    assert headings == ["", "Results", "What differs", "Answers side by side"]
    cards = found.sections()[-1].cards
    shared = [
        each for each in found.runs[0].start["prompts"] if each in found.runs[1].start["prompts"]
    ]
    assert len(cards) == len(shared) == 3
    assert [answer.label for answer in cards[0].answers] == ["expected", "plain", "plus"]
    html = found._repr_html_()
    assert html.count('class="best"') == sum(map(len, found.best.values()))
    assert "<style>.mlx_loraplus {" in html, "the notebook's own elements keep their style"


def test_losses_on_other_examples_have_no_best(place: Place):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    found.runs[0].start["valid"]["examples"] += 1
    assert found.best.keys().isdisjoint({"validation loss", "exact answers"})
    assert found.best["training loss"]
    note = "Do not compare validation loss and exact answers: the validation examples differ."
    assert found.notes() == [note]
    assert note in " ".join(str(found).split())
    assert note in found._repr_html_()


def test_examples_differ_although_their_counts_are_equal(place: Place):
    found = ml.compare_runs(place.run("one"), place.run("two"))
    assert not found.not_comparable
    start = found.runs[1].start["valid"]
    start["digest"] = "other"
    assert set(found.not_comparable) == {"validation loss", "exact answers"}
    del start["digest"]  # a run of an older version
    assert not found.not_comparable


def test_losses_of_other_objectives_have_no_best_and_no_unit(place: Place):
    found = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    assert "(nats per token)" in found.plot().axes[0].get_ylabel()
    run = found.runs[0]
    run.config = replace(run.config, objective=replace(run.config.objective, objective="dpo"))
    assert found.best.keys().isdisjoint({"validation loss", "training loss"})
    assert found.best["speed"]
    assert found.notes() == [
        "Do not compare validation loss and training loss: the objectives or their settings differ."
    ]
    assert found.plot().axes[0].get_ylabel() == "validation loss"


def test_names_that_rich_would_take_for_markup_and_the_folder_one_stands_in(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("r8 [bold]", "r8 [red]"):
        shutil.copytree(place.folder / "plain", tmp_path / name)
    monkeypatch.chdir(tmp_path / "r8 [bold]")
    shown = str(ml.compare_runs(".", tmp_path / "r8 [red]"))
    assert "r8 [bold]" in shown
    assert "r8 [red]" in shown


def test_the_command(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [str(place.folder / name) for name in ("plain", "plus")]
    for name in ("curves.html", "curves.png", "curves.svg"):
        main([*runs, "--save-path", str(tmp_path / name)])
        said = capsys.readouterr().out
        assert "lr_ratio" in said
        assert (tmp_path / name).stat().st_size > 5000
    (tmp_path / "folder.png").mkdir()
    for words, told in (
        ([*runs, "--save-path", str(tmp_path / "curves.png")], "exists already"),
        (
            [*runs, "--save-path", str(tmp_path / "folder.png"), "--overwrite"],
            "is a folder: give the name of a file, which ends in .html or .png or .svg",
        ),
        (
            [*runs, "--save-path", str(place.folder / "data")],
            "data is a folder: give the name of a file",
        ),
        ([*runs, "--save-path", "curves.gif"], "must end in .html, .png, .svg"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([], "give the folders of runs"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        said = capsys.readouterr().err.strip()
        assert told in said
        assert said.count("\n") == 0
    (tmp_path / "curves.svg").write_text("old")
    main([*runs, "--save-path", str(tmp_path / "curves.svg"), "--overwrite"])
    assert (tmp_path / "curves.svg").stat().st_size > 5000


def test_another_schema_is_told(place: Place, tmp_path: Path):
    shutil.copytree(place.folder / "plain", tmp_path / "newer")
    history = tmp_path / "newer" / "history.jsonl"
    history.write_text(history.read_text().replace('"schema": 2', '"schema": 7'))
    with pytest.raises(ml.OutputError, match=r"newer/history.jsonl:1 has schema 7, not 2"):
        ml.compare_runs(place.folder / "plain", tmp_path / "newer")
