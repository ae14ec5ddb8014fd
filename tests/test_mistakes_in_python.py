"""Plausible mistakes in Python: one line, one right next step, and nothing left behind."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import re
from pathlib import Path

import pytest

from tests.mistakes_workshop import make_workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what people have."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


PYTHON = [
    ("finetune(model, tokenizer, 'sums')", "everything else by name, such as data=…"),
    ("finetune(tokenizer, model, data='sums')", "is a TokenizerWrapper, not a model"),
    ("finetune(model, tokenizer, data=None)", "data is None; give a path or a hub id"),
    ("finetune(model, tokenizer, data='sums', adapter_path='run')", "resume=True continues it"),
    ("finetune(model, tokenizer, data='sums', adapter_path='sums')", "give another adapter_path"),
    ("finetune(model, tokenizer, data='sums', model='other')", "is not the model given"),
    ("finetune(model, tokenizer, data='sums', prompts='nofile.txt')", "must be the text itself"),
    ("finetune(model, tokenizer, data='sums', iters=0)", "iters must be greater than or equal to 1"),
    ("finetune(model, tokenizer, data='tiny')", "are model and data swapped?"),
    ("evaluate(model, tokenizer, data='sums', split='eval')", "split must be 'train' or 'valid' or 'test'"),
    ("evaluate(model, tokenizer, data='sums', answers=-1)", "answers is -1; allowed are 0"),
    ("sweep_rates(tuned, tokenizer, data='sums', adapter_path='new')", "the model has adapters already"),
    ("sweep_rates(model, tokenizer, data='sums', adapter_path='run')", "run holds a run"),
    ("sweep_rates(model, tokenizer, data='sums', learning_rates=1e-4)", "must be a list of values, not 0.0001"),
    ("sweep_rates(model, tokenizer, data='sums', lr_ratios=[])", "lr_ratios must have at least 1 item"),
    ("fuse_adapter(model)", "the model has no adapters to fuse"),
    ("fuse_adapter(tuned, bits=7)", "bits must be 'auto', 2, 3, 4, 5, 6 or 8, not 7"),
    ("fuse_adapter(tuned, bits=4, dequantize=True)", "dequantize and bits exclude each other"),
    ("save_adapter(model, 'new')", "the model has no adapters to save"),
    ("save_adapter(tuned, 'run')", "run holds a run (history.jsonl): give another adapter_path"),
    ("save_adapter(tuned, 'tiny', overwrite=True)", "tiny holds a model"),
    ("save_adapter(tuned, 'sums')", "sums holds data"),
    ("save_adapter(tuned, 'peft')", "give another adapter_path, or overwrite=True"),
    ("save_adapter(tuned, 'typo.yaml')", "typo.yaml is a file, not a folder; choose another place"),
    ("save_adapter(tuned, '')", "adapter_path must be a path, not ''"),
    ("load_adapter(model, 'nothere')", "there is no folder nothere"),
    ("load_adapter(model, 'tiny')", 'tiny is a model, not an adapter: give it as model="tiny"'),
    ("load_adapter(model, 'gguf/adapter.gguf')", "is a GGUF file: convert it first"),
    ("load_adapter(tuned, 'run')", "the model has adapters already"),
    ("load('')", "the name of the model is empty"),
    ("load('run', 'run')", "leave model out if the adapter names its model"),
    ("attach_adapters(tuned, ml.AdapterConfig())", "the model has adapters already"),
    ("attach_adapters(model, ml.AdapterConfig(rank=0))", "rank must be greater than or equal to 1"),
    ("LoRAPlus(ml.OptimizerConfig(), 0)", "total_steps is 0; allowed are 1 or more"),
    ("preview('sums', 'tiny')", "tokenizer must be the tokenizer that load returns or None"),
    ("plan_memory('gemma-3', memory='lots')", "give a size such as 16GB"),
    ("compare_runs()", "there is nothing to compare"),
    ("compare_runs(['run', 'grun'])", "takes runs one after the other"),
    ("compare_runs('run').plot('accuracy')", "name is 'accuracy'; allowed are valid_loss, loss"),
    ("compare_runs('run').save('run/report.html')", "give another save_path, or overwrite=True"),
    ("complete(model, tokenizer, '')", "the prompt is empty"),
    ("complete(model, tokenizer, 'hi', max_tokens=0)", "max_tokens must be greater than or equal to 1"),
    ("complete(model, tokenizer, 'hi', temperature=-1.0)", "temperature must be greater than or equal to 0"),
    ("Run.load('tiny')", "give the folder of a run"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "told"), PYTHON, ids=[call for call, _ in PYTHON])
def test_a_plausible_mistake_in_python(
    workshop: Path, call: str, told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = ml.load("tiny")
    tuned, _ = ml.load("run")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(ml.LoRAPlusError) as error:
        eval(f"ml.{call}", {"ml": ml, "model": model, "tokenizer": tokenizer, "tuned": tuned})
    said = str(error.value)
    assert told in said
    assert "\n" not in said
    assert not re.search(
        r"--(?!from|list-models|model BASE|adapter-path gguf|save-path imported)", said
    ), said
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
