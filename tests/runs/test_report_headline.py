"""What a run's page says first."""

from dataclasses import replace
from pathlib import Path

import pytest

import mlx_loraplus as ml
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.runs.next_steps import closing
from mlx_loraplus.runs.report import report_page
from mlx_loraplus.runs.report_headline import headline
from mlx_loraplus.settings import configure
from tests.runs.conftest import with_answers, with_losses


@pytest.mark.parametrize(
    ("right", "lead", "advised"),
    [
        ({0: 0, 6: 0}, "but the answers still differ from the expected ones. 0 of 6 sample answers are exact, as before", "all 6 sample answers still differ from the expected ones: read them before you use the model, and if they are wrong, train longer"),
        ({0: 0, 6: 2}, "but the answers still differ from the expected ones. 2 of 6 sample answers are exact; before", "4 of 6 sample answers still differ"),
        ({0: 5, 6: 3}, "but the answers still differ", "fewer sample answers are exact than before training (5 -> 3)"),
        ({0: 2, 6: 3}, "Better than the base model: the validation loss is 70% lower. 3 of 6", ""),
    ],
)  # fmt: skip
def test_wrong_answers_count_more_than_a_lower_loss(
    folder: Path, right: dict[int, int], lead: str, advised: str
):
    run = with_losses(with_answers(ml.Run.load(folder), right), {0: 3.0, 2: 2.0, 4: 1.5, 6: 0.9})
    head = headline(run)
    assert lead in head.lead
    assert ("Better than" in head.lead) == (not advised)
    assert ("sample answer" in head.next_step) == bool(advised)
    assert advised.lower() in head.next_step.lower()
    assert [label for label, _ in head.commands] == ["longer", "try it", "fuse it"]
    assert head.next_step[1:-1] in "\n".join(closing(run)), "the terminal says the same"


@pytest.mark.parametrize(
    ("count", "right", "leads", "advice"),
    [
        (1, {0: 0, 6: 0}, "but the answer differs from the expected one. The sample answer is not exact, as before training.", "The sample answer still differs from the expected one: read it before you use the model, and if it is wrong, train longer."),
        (1, {0: 1, 6: 0}, "The sample answer is not exact; before training, it was.", "The sample answer was exact before training, and is not now: read it before you use the model, and if it is wrong, train longer."),
        (1, {0: 0, 6: 1}, "The sample answer is exact; before training, it was not.", None),
        (2, {0: 0, 6: 0}, "0 of 2 sample answers are exact, as before training.", "Both sample answers still differ from the expected ones: read them"),
    ],
)  # fmt: skip
def test_one_answer_is_singular_and_two_are_both(
    folder: Path, count: int, right: dict[int, int], leads: str, advice: str | None
):
    run = with_answers(ml.Run.load(folder), right, count)
    head = headline(with_losses(run, {0: 3.0, 2: 2.0, 4: 1.5, 6: 0.9}))
    assert leads in head.lead
    assert advice is None or head.next_step.startswith(advice)


def test_the_title_says_how_it_was_trained_and_where_it_was_resumed(folder: Path):
    run = ml.Run.load(folder)
    assert ": SFT (LoRA+) on 40 examples from data" in headline(run).title
    run.start["resumed"] = [2]
    assert headline(run).title.endswith("from data, resumed from step 2")
    run.start["resumed"] = [2, 4, 5, 1000]
    assert headline(run).title.endswith(", resumed from steps 4, 5, 1,000")
    for adapter, objective, kind in (("full", "dpo", "DPO (full)"), ("dora", "kto", "KTO (DoRA)")):
        config = configure(TrainConfig, {"adapter": adapter, "objective": objective})
        unit = "pairs" if objective == "dpo" else "examples"
        assert f": {kind} on 40 {unit} from" in headline(replace(run, config=config)).title


def test_memory_above_the_plan_is_said_in_words(folder: Path):
    run = ml.Run.load(folder)
    peak = 9.05
    for event in run.history:
        event |= {"peak_memory_gb": peak} if "loss" in event else {}
    for planned, words in (
        (peak / 1.25, "25% above the planned"),
        (peak / 1.005, "about the planned 9.00 GB"),
        (peak / 1.0001, "as planned"),
        (peak, "within the planned"),
        (peak * 1.2, "within the planned"),
    ):
        run.start["memory"]["planned_gb"] = planned
        assert headline(run).tiles[-1].note.startswith(words)
        assert f"is {words}" in report_page(run).decode()


def test_the_first_page_of_a_run_says_what_comes_first_and_what_is_planned(folder: Path):
    run = ml.Run.load(folder)
    run.history, run.progress.step = [run.start], 0
    run.start["memory"] |= {"planned_gb": 2.5, "available_gb": 12.0}
    head = headline(run, live=True)
    assert head.lead == "Training begins with a validation of what it starts from."
    assert [(tile.name, tile.value, tile.note) for tile in head.tiles] == [
        ("Planned memory", "2.50 GB", "of 12.00 GB")
    ]

    # Nothing is validated, or the plan is unknown.
    run.start["valid"]["examples"] = 0
    del run.start["memory"]["planned_gb"]
    head = headline(run, live=True)
    assert (head.lead, head.tiles) == ("", [])
