"""A whole run on the real SmolLM2, the notebook's way, and what its folder holds."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load
from mlx_lm.utils import load_model

import mlx_loraplus as ml
from mlx_loraplus.adapters.damaged_files import CHECKPOINTS
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.inference.generate import answer_all
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.runs.history import PLOT, REPORT, RESIDUALS, SETTINGS
from mlx_loraplus.training.checkpoint import HISTORY

# Mean training loss of the first five and the last three of the 8 steps below, as recorded; BLAS
# builds round differently.
RECORDED_FIRST, RECORDED_LAST = 1.3522, 0.3748


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory):
    """Train SmolLM2 for 8 steps on the demo set."""
    model, tokenizer = ml.load("smollm2-135m")
    told: list[str] = []
    run = ml.finetune(
        model,
        tokenizer,
        data=str(write_rows(tmp_path_factory.mktemp("data"))),
        iters=8,
        batch_size=2,
        learning_rate=5e-4,
        lr_ratio=16,
        warmup=2,
        steps_per_report=5,
        steps_per_eval=200,
        sample_rows=1,
        adapter_path=str(tmp_path_factory.mktemp("run") / "smollm2"),
        log=told.append,
    )
    return model, tokenizer, run, told


def write_rows(folder: Path) -> Path:
    """Write some of the demo set as files, small enough for a test."""
    from mlx_loraplus.data.demo import demo_rows

    splits = demo_rows()
    for name, rows in (("train", splits["train"][:100]), ("valid", splits["valid"][:2])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_the_loss_falls_as_recorded(smollm2_run):
    _, _, run, _ = smollm2_run
    losses = [loss for _, loss in run.losses()]
    one, rest = [event for event in run.history if "loss" in event][:2]  # step 1, steps 2 to 5
    total = sum(event["loss"] * event["supervised_tokens"] for event in (one, rest))
    first = total / (one["supervised_tokens"] + rest["supervised_tokens"])
    assert first == pytest.approx(RECORDED_FIRST, rel=0.02)
    assert losses[-1] == pytest.approx(RECORDED_LAST, rel=0.02)
    valid = [loss for _, loss in run.losses("valid_loss")]
    assert valid[-1] < 0.5 * valid[0]


def test_the_folder_holds_everything(smollm2_run):
    _, _, run, told = smollm2_run
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "adapters.safetensors",
        "adapter_config.json",
        SETTINGS,
        HISTORY,
        PLOT,
        REPORT,
        CHECKPOINTS,
        ".lock",
    }
    events = [json.loads(line) for line in (run.folder / HISTORY).read_text().splitlines()]
    assert events == run.history
    assert (run.folder / PLOT).read_bytes().startswith(b"\x89PNG")
    assert any("rates A 5.00e-04, B 8.00e-03" in line or "rates A" in line for line in told)
    assert "<table>" in run._repr_html_()
    assert run.finished


def test_stock_mlx_lm_loads_the_real_adapter_with_the_same_logits(smollm2_run):
    model, _, run, _ = smollm2_run
    stock, _ = stock_load(str(find_model("smollm2-135m").path), adapter_path=str(run.folder))  # pyright: ignore
    tokens = mx.array([[1, 400, 22, 3111, 9, 12]])
    expected = model(tokens)
    assert mx.abs(stock(tokens) - expected).max() < 2e-4 * mx.abs(expected).max()


def test_the_notebooks_other_names(smollm2_run, tmp_path: Path):
    model, tokenizer = smollm2_run[:2]
    prompt = "Request: dim the kitchen lights to 40%\nCommand:"
    answer = ml.complete(model, tokenizer, prompt, max_tokens=8)
    assert answer.strip().startswith("{")
    tokens = [encode_prompt(text, tokenizer) for text in (prompt, "Hello")]
    assert answer_all(model, tokenizer, tokens, max_tokens=8)[0].strip() == answer.strip()

    ml.save_adapter(model, tmp_path / "adapter")
    other, _ = ml.load("smollm2-135m")
    ml.load_adapter(other, tmp_path / "adapter")
    tokens = mx.array([[1, 400, 22, 3111, 9, 12]])
    before = model(tokens)
    assert mx.array_equal(other(tokens), before)
    ml.fuse_adapter(other)
    assert mx.abs(other(tokens) - before).max() < 1e-4 * mx.abs(before).max()


def test_the_fuse_command_writes_what_stock_mlx_lm_generates_from(smollm2_run, tmp_path: Path):
    from mlx_loraplus.fuse import main

    model, _, run, _ = smollm2_run
    main(
        [
            "--model",
            "smollm2-135m",
            "--adapter-path",
            str(run.folder),
            "--save-path",
            str(tmp_path / "fused"),
        ]
    )
    fused, _ = load_model(tmp_path / "fused")
    tokens = mx.array([[1, 400, 22, 3111, 9, 12]])
    before = model(tokens)
    assert mx.abs(fused(tokens) - before).max() < 1e-4 * mx.abs(before).max()
    assert (tmp_path / "fused" / "tokenizer.json").is_file()


def test_a_run_goes_on_from_the_weights_of_another(smollm2_run, tmp_path: Path):
    tokenizer, run = smollm2_run[1:3]
    model, _ = ml.load("smollm2-135m")
    settings = {
        "iters": 1,
        "batch_size": 2,
        "sample_rows": 0,
        "adapter_path": str(tmp_path / "next"),
        "data": run.config.data.data,
    }
    on = ml.finetune(model, tokenizer, resume_adapter_file=str(run.folder), **settings)
    assert on.losses("valid_loss")[0][1] == run.losses("valid_loss")[-1][1]


def test_a_second_run_in_the_folder_is_refused_and_the_first_is_kept(smollm2_run):
    model, tokenizer, run, _ = smollm2_run
    before = (run.folder / "adapters.safetensors").read_bytes()
    with pytest.raises(ml.ConfigError, match="still has the adapters of an earlier run"):
        ml.finetune(model, tokenizer, adapter_path=str(run.folder))
    with pytest.raises(ml.ConfigError, match="lr_ration is not a setting"):
        ml.finetune(model, tokenizer, lr_ration=4)
    assert (run.folder / "adapters.safetensors").read_bytes() == before
    assert isinstance(run.config, TrainConfig)


def test_a_loftq_run_keeps_its_base_and_tells_what_quantizing_lost(tmp_path: Path):
    model, tokenizer = ml.load("smollm2-135m")
    settings = {"data": str(write_rows(tmp_path)), "batch_size": 2}
    run = ml.finetune(
        model, tokenizer, adapter_path=str(tmp_path / "run"), iters=1, num_layers=1, adapter="dora", init="loftq", sample_rows=0,
        target_modules=["k_proj", "v_proj"], train_modules=["model.norm"], **settings,
    )  # fmt: skip
    residuals = json.loads((run.folder / RESIDUALS).read_text())
    assert len(residuals) == 2
    assert all(after < before for before, after in residuals.values())
    loaded, _ = ml.load("smollm2-135m", run.folder)
    valid = ml.evaluate(loaded, tokenizer, answers=0, **settings).loss
    assert valid == pytest.approx(run.losses("valid_loss")[-1][1], rel=1e-5)
    ml.fuse_adapter(loaded, dequantize=True)
    assert ml.evaluate(loaded, tokenizer, answers=0, **settings).loss == pytest.approx(
        valid, rel=1e-3
    )
    with pytest.raises(ml.ConfigError, match="still has the adapters of an earlier run"):
        ml.finetune(model, tokenizer, adapter_path=str(run.folder))
