"""The study of the learning rate: it grows its grid, resumes, and judges what it found."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scripts.study.rate import Case, all_cases, baselines, main, print_plan  # isort: skip
from scripts.study.rate_methods import METHODS
from scripts.study.rate_page import PAGE, Study, Truth, tables_of, truth_of
from scripts.study.rate_short_grids import short_grids_table
from scripts.tiny_model import write_sums, write_tiny_model


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one case on a tiny model."""
    folder = tmp_path_factory.mktemp("study")
    write_tiny_model(folder / "model", layers=1)
    write_sums(folder / "data")
    run(folder)
    return folder


def run(folder: Path, *more: str) -> None:
    case = Case(str(folder / "model"), "text", 4)
    words = ["--data", f"text={folder / 'data'}", "--steps", "30", "--results", str(folder / "rate.jsonl")]  # fmt: skip
    main([*words, *more], [case])


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rate.jsonl").read_text().splitlines()]


def test_a_case_gets_its_grid_its_searches_and_its_baselines(studied: Path):
    lines = lines_of(studied)
    kinds = [line["kind"] for line in lines]
    assert kinds.count("search") == 2 * len(METHODS)
    assert all(kinds.count(name) == 1 for name in ("default", "mlx-lm", "Unsloth"))
    assert {"machine", "versions", "commit", "seed", "seconds"} <= lines[0].keys()

    # The grid of the first seed has two more rates on both sides of the best one. The other seed
    # has the best one and its neighbours.
    grid: dict[float, list[float]] = {}
    for line in lines:
        if line["kind"] == "grid":
            loss = math.inf if line["loss"] is None else line["loss"]
            grid.setdefault(line["learning_rate"], []).append(loss)
    rates = sorted(grid)
    best = int(np.argmin([np.mean(grid[rate]) for rate in rates]))
    assert 2 <= best <= len(rates) - 3
    assert all(len(grid[rate]) == 2 for rate in rates[best - 1 : best + 2])
    assert len(grid[rates[0]]) == len(grid[rates[-1]]) == 1

    # Searches of equal cost, none of them without a result.
    searches = [line for line in lines if line["kind"] == "search"]
    assert all(0 < line["cost"] <= 30.5 for line in searches)
    assert all(line["rate"] > 0 and line["tried"] for line in searches)


def test_what_is_there_is_not_made_again(studied: Path, capsys: pytest.CaptureFixture[str]):
    before = (studied / "rate.jsonl").read_text()
    run(studied, "--minutes", "0")
    assert "the time is up" not in capsys.readouterr().out
    assert (studied / "rate.jsonl").read_text() == before

    # Without a line, there is something to do, and no time for it.
    kept = before.splitlines()[:-1]
    (studied / "rate.jsonl").write_text("\n".join(kept) + "\n")
    run(studied, "--minutes", "0")
    assert "the time is up" in capsys.readouterr().out
    (studied / "rate.jsonl").write_text(before)


def test_the_tables_show_what_was_found(studied: Path):
    lines = lines_of(studied)
    name = lines[0]["case"]
    tables = tables_of(lines, [name, "another case"])
    assert all(f"| {method} |" in tables for method in [*METHODS, "default", "mlx-lm", "Unsloth"])
    assert "not studied: another case" in tables
    assert "1 of 2 cases, runs of 30 steps, 2 seeds" in tables


def test_results_of_others_do_not_reach_the_docs(studied: Path):
    before = PAGE.read_text()
    run(studied, "--table")
    assert PAGE.read_text() == before


def test_the_plan_says_what_is_left(studied: Path, capsys: pytest.CaptureFixture[str]):
    case = Case(str(studied / "model"), "text", 4)
    assert print_plan([case], lines_of(studied), 30, 2) == pytest.approx(0, abs=0.1)
    assert print_plan([case], [], 30, 2) > 0
    assert "about" in capsys.readouterr().out


def test_data_without_a_folder_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--results", str(tmp_path / "none.jsonl")], [Case("smollm2-135m", "chat", 1)])
    assert "left out, because --data has no chat" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--data", "poems=folder"])


def test_the_first_cases_answer_early_and_none_comes_twice():
    cases = all_cases()
    assert [(case.data, case.ratio) for case in cases[:2]] == [("demo", 1), ("demo", 16)]
    assert len({case.name for case in cases}) == len(cases)
    asked = {(case.adapter, case.init) for case in cases}
    assert asked == {("lora", "init1"), ("lora", "init2"), ("lora", "pissa"), ("dora", "init1"), ("vera", "init1")}  # fmt: skip
    assert {case.batch for case in cases} == {4, 16}
    assert baselines(Case("m", "demo", 4, adapter="vera")).keys() == {"default"}


def grid_of(case: str, losses: dict[float, tuple[float | None, float | None]]) -> list[dict]:
    """The lines of a grid: rate → the losses of both seeds."""
    return [
        {"case": case, "kind": "grid", "learning_rate": rate, "seed": seed, "loss": loss, "steps": 60}
        for rate, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]  # fmt: skip


def test_regret_is_in_standard_deviations_and_interpolated():
    truth = truth_of(grid_of("a", {1e-3: (1.0, 1.0), 1e-2: (0.4, 0.6), 1e-1: (None, 0.7)}))
    assert truth is not None
    assert truth.rates.tolist() == [1e-3, 1e-2, 1e-1]
    assert truth.noise == pytest.approx(0.1)  # the mean of the variances 0, 0.02
    assert truth.regret(truth.loss_at(1e-2)) == 0
    assert truth.loss_at(10**-2.5) == pytest.approx(0.75)
    assert truth.regret(truth.loss_at(10**-2.5)) == pytest.approx(2.5)
    assert math.isinf(truth.loss_at(2e-2))  # next to a run that diverged
    assert truth.covers(5e-3)
    assert not truth.covers(1e-4)
    assert truth.loss_at(1e-5) == truth.loss_at(1e-3)


def test_a_rate_that_one_seed_has_tried_is_compared_without_what_the_seed_adds():
    lines = grid_of("a", {1e-3: (1.0, 3.0), 1e-2: (0.0, 2.0), 1e-1: (0.5, 2.5)})
    lines += [line for line in grid_of("a", {1e-4: (2.0, 0.0)}) if line["seed"] == 0]
    truth = truth_of(lines)
    assert truth is not None
    assert truth.rates.tolist() == [1e-4, 1e-3, 1e-2, 1e-1]
    assert truth.losses.tolist() == pytest.approx([3.0, 2.0, 1.0, 1.5])
    assert truth.added == pytest.approx({0: -1.0, 1: 1.0})


def test_a_search_is_shown_beside_the_short_grid_of_its_case():
    setup = {
        "model": "gemma-3-270m",
        "data": "demo",
        "ratio": 4,
        "adapter": "lora",
        "init": "init1",
        "batch": 4,
    }
    line = {
        "kind": "search",
        "method": "range test",
        "case": "a",
        "setup": setup,
        "critical": 9e-4,
        "default": 5e-4,
    }
    table = short_grids_table([line, line | {"setup": setup | {"init": "pissa"}}], "range test")
    row = table.splitlines()[2].split("|")
    assert (
        sum(line.startswith("|") for line in table.splitlines()) == 4
    )  # there is no short grid for PiSSA
    best, critical, ratio, default = map(float, row[2:6])
    assert 2.15e-4 < best < 1e-3
    assert ratio == pytest.approx(critical / best, rel=0.05)
    assert default == pytest.approx(5e-4 / best, rel=0.05)
    assert short_grids_table([], "range test") == ""


def test_a_share_is_fitted_to_the_other_cases():
    shape = {-2: 3.0, -1: 2.0, 0: 1.0, 1: 2.0, 2: 3.0}
    truths, searches = {}, {}
    for case, best in (("a", 1e-3), ("b", 1e-2), ("c", 1e-4)):
        rates = np.array([best * 10 ** (step / 3) for step in shape])
        truths[case] = Truth(rates, np.array(list(shape.values())), 0.5)
        critical = best * (100 if case == "c" else 4)  # the third case contradicts the others
        searches[case] = {"range test": [{"critical": critical, "rate": critical}]}
    study = Study(truths, searches, {})

    assert study.fitted_factor("range test", without="c") == pytest.approx(0.25, rel=0.1)
    factors = {case: study.fitted_factor("range test", case) for case in truths}
    regrets = study.regrets("range test", factors.__getitem__)
    assert regrets["c"][0] > 2  # the factor of the others does not suit it
