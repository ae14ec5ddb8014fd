"""A run that is resumed from a checkpoint equals an undisturbed one bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

import mlx_loraplus as ml
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.stored_files import read_weights
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.data.packing import PackedBatches
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.runs.history import SCHEMA
from mlx_loraplus.runs.run_folder import FILES, FOLDERS
from mlx_loraplus.runs.state import Event, Progress
from mlx_loraplus.settings import configure, settings_of
from mlx_loraplus.training.checkpoint import (
    best_folder,
    checkpoint_folder,
    find_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from mlx_loraplus.training.interrupts import interruptible
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.run_fingerprint import (
    RunFingerprint,
)
from mlx_loraplus.training.schedule import schedule_of
from mlx_loraplus.training.trainer import TrainState, train
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import TinyModel, make_model, same
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    compiled_choices,
    examples,
    keep_loops,
    validate_on_what_is_unlearned,
    without_times,
)

UPDATES, STOPS = 7, (2, 5)


def session(folder: Path, config: TrainConfig, *, stop_after: int | None, kind: str) -> list[Event]:
    """Start or resume in ``folder`` as a new process would, and return the history."""
    model = make_model(kind)
    mx.random.seed(config.seed)
    attach_adapters(model, config.adapter)
    learned = examples(20)
    if config.data.pack:
        batches: Batches = PackedBatches(learned, config.data.batch_size, config.seed, 40)
    else:
        batches = Batches(learned, config.data.batch_size, config.seed)
    length = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, length.steps)
    optimizer.init(model, trainable_summary(model).groups)
    grad_checkpoint = config.grad_checkpoint == "on"
    identity = RunFingerprint(settings_of(config), "model", "rows", {}, grad_checkpoint)
    progress, history = Progress(), [{"step": 0, "schema": SCHEMA}]
    checkpoint = find_checkpoint(folder, print)
    if checkpoint is not None:
        restore(checkpoint, model, optimizer)
        progress, history = checkpoint.progress, checkpoint.history

    def save() -> None:
        save_checkpoint(folder, model, optimizer, progress, identity, history, keep=1)
        if progress.step == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    state = TrainState(
        model, find_trunk_and_head(model), optimizer, batches, length, progress, grad_checkpoint
    )
    with interruptible() as stop_requested:
        outcome = train(
            state,
            examples(3, seed=9),
            config,
            report=history.append,
            save=save,
            stop_requested=stop_requested,
        )
    assert outcome == ("finished" if stop_after is None else "interrupted")
    assert progress.step == (UPDATES if stop_after is None else stop_after + 1)
    return history


CASES: dict[str, dict[str, Any]] = {
    "adamw, cosine, dropout, accumulation": {"dropout": 0.3, "grad_accumulation_steps": 3, "weight_decay": 0.1},
    "adam, linear, dropout, checkpointing": {
        "optimizer": "adam", "schedule": "linear", "dropout": 0.3, "grad_checkpoint": "on",
    },
    "sgd, constant, packed": {"optimizer": "sgd", "schedule": "constant", "pack": True},
    "lion, compiled, dropout": {"optimizer": "lion", "compile": "on", "dropout": 0.3, "learning_rate": 1e-5},
    "adafactor, embeddings": {"optimizer": "adafactor", "target_modules": ["q_proj", "embed_tokens"]},
    "muon, linear, epochs that end in a short window": {
        "optimizer": "muon", "schedule": "linear", "grad_accumulation_steps": 3, "iters": None, "epochs": 2,
    },
    "gemma3, all at once": {
        "kind": "gemma3", "compile": "on", "grad_checkpoint": "on", "pack": True, "dropout": 0.2,
        "grad_accumulation_steps": 2,
    },
    "mixtral, experts": {"kind": "mixtral", "dropout": 0.1},
    "dora": {"adapter": "dora", "dropout": 0.1},
    "vera": {"adapter": "vera"},
    "pissa": {"init": "pissa"},
    "modules in full": {"train_modules": ["norm", "lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(case: str, tmp_path: Path):
    settings = {
        "iters": UPDATES,
        "batch_size": 2,
        "warmup": 2,
        "rank": 4,
        "steps_per_save": 1,
    } | CASES[case]
    settings |= {"steps_per_report": 3, "steps_per_eval": 4}
    kind = settings.pop("kind", "llama")
    config = configure(TrainConfig, settings)
    undisturbed = session(tmp_path / "one", config, stop_after=None, kind=kind)
    for stop in STOPS:
        session(tmp_path / "two", config, stop_after=stop, kind=kind)
        mx.random.seed(999)  # what another process's random state might be
    resumed = session(tmp_path / "two", config, stop_after=None, kind=kind)
    assert without_times(resumed) == without_times(undisturbed)
    assert [event["step"] for event in resumed] == [0, 0, 1, 3, 4, 6, 7, 7]
    one, two = (
        read_checkpoint(checkpoint_folder(tmp_path / name, UPDATES)).folder
        for name in ("one", "two")
    )
    for file in ("adapters.safetensors", "trained.safetensors", "state.safetensors"):
        assert same(read_weights(one / file), read_weights(two / file)), file


def test_a_resumed_run_compiles_the_steps_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loops = keep_loops(monkeypatch)
    settings = {"iters": UPDATES, "batch_size": 2, "grad_accumulation_steps": 2, "compile": "on"}
    config = configure(TrainConfig, settings | {"warmup": 2, "rank": 4, "steps_per_save": 1})
    session(tmp_path / "one", config, stop_after=None, kind="llama")
    for stop in (*STOPS, None):
        session(tmp_path / "two", config, stop_after=stop, kind="llama")
    assert compiled_choices(loops[0]) == compiled_choices(loops[-1])
    assert loops[0]._shapes == loops[-1]._shapes


# Through finetune, on files.


def test_finetune_resumes_and_reports_changed_settings(place: Place):
    undisturbed = place.run("one")
    assert place.run("two", stop_at=3).outcome == "interrupted"
    resumed = place.run("two", resume=True, steps_per_save=3, keep_checkpoints=5)
    assert resumed.outcome == "finished"
    assert [line for line in place.told if line.startswith("resume")] == [
        "resume: steps_per_save 2 -> 3",
        "resume: keep_checkpoints 2 -> 5",
        "resume: from step 3 of 6",
    ]
    assert same(adapter_of(undisturbed), adapter_of(resumed))
    assert without_times(resumed.history) == without_times(undisturbed.history)
    written = [
        json.loads(line) for line in (resumed.folder / "history.jsonl").read_text().splitlines()
    ]
    assert written == resumed.history
    again = yaml.safe_load((resumed.folder / "run.yaml").read_text())
    assert (again["resume"], again["overwrite"], again["steps_per_save"]) == (False, False, 3)
    assert place.run("two", resume=True).history == resumed.history, "nothing is left to do"
    assert place.told_with("nothing is left").endswith("6 of 6 steps: raise iters or epochs")


def test_more_steps_continue_from_the_last_step_not_from_the_best(place: Place):
    first = place.run(schedule="constant")
    more = place.run(schedule="constant", resume=True, iters=8)
    assert place.told_with("resume: iters") == "resume: iters 6 -> 8"
    assert more.history[0] == first.history[0] | {"steps": 8, "resumed": [6]}
    assert more.history[1 : len(first.history) - 1] == first.history[1:-1], "but for the end"
    assert [event["step"] for event in more.history if "loss" in event] == list(range(1, 9))
    whole = place.run("other", schedule="constant", iters=8)
    assert same(adapter_of(whole), adapter_of(more))


def test_a_killed_run_with_fractional_weights_resumes_bit_exactly(place: Place):
    more = write_sums(place.folder / "more", seed=1)
    weighted = {
        "data": [str(place.folder / "data"), str(more)],
        "data_weights": [0.5, 1.5],
        "iters": 45,  # each epoch draws other examples
        "steps_per_eval": 15,
        "steps_per_save": 5,
    }
    undisturbed = place.run("one", **weighted)
    settings = settings_of(undisturbed.config) | {"adapter_path": str(place.folder / "two")}
    (place.folder / "two.yaml").write_text(yaml.safe_dump(settings))

    # Kill the run where the checkpoint is some steps old, in the second epoch.
    code = f"""
import os, signal
from mlx_loraplus.training import trainer
seed_of = trainer.seed_of
def seed(seed, step, part):
    if step == 29:
        os.kill(os.getpid(), signal.SIGKILL)
    return seed_of(seed, step, part)
trainer.seed_of = seed
from mlx_loraplus.train import main
main(["-c", {str(place.folder / "two.yaml")!r}])
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    resumed = place.run("two", resume=True, **weighted)
    assert "resume: from step 25 of 45" in place.told
    assert same(adapter_of(resumed), adapter_of(undisturbed))
    assert without_times(resumed.history) == without_times(undisturbed.history)


def test_a_run_without_a_checkpoint_starts_again_and_a_folder_without_a_run_is_refused(
    place: Place,
):
    undisturbed = place.run("one")
    with pytest.raises(ml.OutputError, match="holds no run to resume"):
        place.run("two", resume=True)
    (place.folder / "two").mkdir()
    (place.folder / "two" / "run.yaml").write_text("killed: before the first save")
    with pytest.raises(ml.OutputError, match="holds no run to resume"):
        place.run("two", resume=True)  # these are no run's settings
    shutil.copy(place.folder / "one" / "run.yaml", place.folder / "two")
    assert same(adapter_of(place.run("two", resume=True)), adapter_of(undisturbed))
    assert "resume: the run has no checkpoint yet, so it starts from the beginning" in place.told
    shutil.rmtree(place.folder / "one" / "checkpoints")
    with pytest.raises(ml.AdapterError, match="no checkpoint to resume from: resume_adapter_file="):
        place.run("one", resume=True)


def test_overwriting_leaves_no_checkpoint_of_the_earlier_run(place: Place):
    place.run()
    place.run(overwrite=True, iters=3, lr_ratio=2)
    assert find_checkpoint(place.folder / "run", print).progress.step == 3  # pyright: ignore
    assert {path.name for path in (place.folder / "run" / "checkpoints").iterdir()} <= {
        "000002",
        "000003",
        "best-000003",
        "best-000002",
    }


def test_the_newest_and_the_best_are_kept_and_the_best_is_restored(place: Place):
    validate_on_what_is_unlearned(place)
    settings: dict[str, Any] = {
        "iters": 12, "steps_per_save": 1, "learning_rate": 0.02, "lr_ratio": 16, "schedule": "constant",
        "keep_checkpoints": 3,
    }  # fmt: skip
    run = place.run(**settings)
    losses = dict(run.losses("valid_loss"))
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best < 10
    kept = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert kept == {f"best-{best:06d}", "000010", "000011", "000012"}
    assert f"was at step {best}: its adapter is kept" in place.told_with("best validation loss")
    assert same(
        adapter_of(run), read_weights(best_folder(run.folder, best) / "adapters.safetensors")
    )
    assert not same(
        adapter_of(run), read_weights(checkpoint_folder(run.folder, 12) / "adapters.safetensors")
    )
    (best_folder(run.folder, best) / "adapter_config.json").write_text("{}")
    again = place.run(**settings, resume=True)
    assert "'adapter_config.json' does not match its checksum" in place.told_with(
        "so the last one is kept"
    )
    assert same(
        adapter_of(again), read_weights(checkpoint_folder(run.folder, 12) / "adapters.safetensors")
    )


def test_a_run_that_started_from_another_adapter_resumes_without_it(place: Place):
    place.run("first", iters=2)
    shutil.move(place.folder / "first", place.folder / "adapter")
    settings = {"resume_adapter_file": str(place.folder / "adapter")}
    undisturbed = place.run("one", **settings)
    place.run("two", stop_at=3, **settings)
    shutil.rmtree(place.folder / "adapter")
    assert same(adapter_of(place.run("two", resume=True, **settings)), adapter_of(undisturbed))


def test_a_run_resumes_on_the_model_of_a_notebook(place: Place):
    undisturbed = place.run("one")
    model, tokenizer = ml.load(str(place.folder / "model"))
    settings = dict(undisturbed.config.__dict__ | {"adapter_path": str(place.folder / "two")})
    flat = settings_of(TrainConfig(**settings))
    ml.finetune(model, tokenizer, **flat | {"max_minutes": 1e-9})
    run = ml.finetune(model, tokenizer, **flat | {"resume": True})
    assert run.finished
    assert same(adapter_of(run), adapter_of(undisturbed))


def test_stock_mlx_lm_loads_a_checkpoint(place: Place, tiny: TinyModel, tmp_path: Path):
    from mlx_lm import load as stock_load

    run = place.run(iters=2)
    stock, _ = stock_load(
        str(place.folder / "model"), adapter_path=str(checkpoint_folder(run.folder, 2))
    )  # pyright: ignore
    ours, _ = ml.load(str(place.folder / "model"), adapter_path=run.folder)
    tokens = mx.array([[1, 40, 22, 31, 9, 12]])
    assert mx.abs(stock(tokens) - ours(tokens)).max() < 1e-5


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_files_that_no_run_wrote_are_kept_unless_overwritten(place: Place, name: str):
    foreign = place.folder / "run" / name
    foreign.mkdir(parents=True) if name in FOLDERS else foreign.parent.mkdir(parents=True)
    mine = foreign / "000002" / "notes.txt" if name in FOLDERS else foreign
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    (place.folder / "run" / "notes.txt").write_text("mine, too")
    with pytest.raises(
        ml.OutputError,
        match=rf"holds {re.escape(name)}, which no run has written: overwrite=True",
    ):
        place.run()
    with pytest.raises(ml.OutputError, match="holds no run to resume"):
        place.run(resume=True)
    assert mine.read_text() == "mine"

    place.run(overwrite=True, iters=2)
    assert (place.folder / "run" / "notes.txt").read_text() == "mine, too"
    if name in FOLDERS:
        assert mine.read_text() == "mine"
        assert (mine.parent / "trained.safetensors").exists(), "a checkpoint is written beside it"
        place.run(overwrite=True, iters=1)
        assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_files_that_cannot_be_replaced_are_reported_before_data_is_read(place: Place, name: str):
    folder = place.folder / "run"
    folder.mkdir()
    (folder / name).write_text("") if name in FOLDERS else (folder / name).mkdir()
    with pytest.raises(
        ml.OutputError, match=r"is a folder, where a run writes|is a file, where a run writes"
    ):
        place.run(overwrite=True, data=str(place.folder / "nowhere"))


def test_a_run_does_not_go_into_a_models_folder(place: Place):
    write_tiny_model(place.folder / "run")
    before = sorted(path.name for path in (place.folder / "run").iterdir())
    with pytest.raises(
        ml.OutputError, match=r"holds a model \(model\.safetensors\): give another adapter_path"
    ):
        place.run()
    assert sorted(path.name for path in (place.folder / "run").iterdir()) == before
