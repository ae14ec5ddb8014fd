"""Plausible mistakes in Python: one line, one right next step, and nothing left behind."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map


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
    ("evaluate(model, tokenizer, data='sums', rank=4, iters=2)", "so iters, rank would have no effect: leave out all but batch_size, data,"),
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
    ("LoRAPlus(learning_rate=1e-4)", "LoRAPlus takes no learning_rate; it takes config, total_steps"),
    ("LoRAPlus(ml.AdapterConfig(), 10)", "must be an OptimizerConfig, not an AdapterConfig"),
    ("Run.load('run/run.yaml')", "run/run.yaml is a file; give the folder of a run"),
    ("LoRAPlus(ml.OptimizerConfig(), 9).init(tuned, None)", "groups must be a dict, not None"),
    ("finetune(model=model, tokenizer=tokenizer)", "takes model and tokenizer by position: finetune(model, tokenizer, …)"),
    ("evaluate(model, tokenizer=tokenizer)", "by position: evaluate(model, tokenizer, …)"),
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
    # values as people write them
    ("finetune(model, tokenizer, data='sums', batch_size=2.5)", "a valid integer or 'auto', not 2.5"),
    ("finetune(model, tokenizer, data='sums', rank=True)", "rank must be a number, not True"),
    ("finetune(model, tokenizer, data=['sums'], data_weights=[True])", "data_weights must be a number, not [True]"),
    ("finetune(model, tokenizer, data='sums', target_modules=[])", "target_modules must have at least 1 item"),
    ("finetune(model, tokenizer, data='sums', adapter_path='run', resume=True, rank=3)", "give only its own settings (see run/run.yaml)"),
    ("finetune(model, tokenizer, data='sums', launch=2)", "launch is not a setting (it is a flag of the command mlx_loraplus.train alone: leave it out)"),
    ("finetune(model, tokenizer, data='sums', verbosity='quiet')", "verbosity is not a setting (it is a flag of the command"),
    ("find_rate(model, tokenizer, data='sums', resume=True)", "leave out resume"),
    ("evaluate(model, tokenizer, data='sums', model='other')", "is not the model given"),
    ("LoRAPlus(ml.OptimizerConfig(), 10).init(model.freeze(), {})", "call attach_adapters first"),
    ("finetune(model, tokenizer, data='sums', iters='ten')", "iters must be a valid integer, not 'ten'"),
    ("finetune(model, tokenizer, data='sums', valid_split='10%')", "not '10%' (write 0.1)"),
    ("finetune(model, tokenizer, data='sums', adapter='LoRA')", "(did you mean 'lora'?)"),
    ("finetune(model, tokenizer, data='sums', optimizer='AdamW')", "(did you mean 'adamw'?)"),
    ("finetune(model, tokenizer, data='sums', output='new')", "(did you mean 'adapter_path'?)"),
    ("finetune(model, tokenizer, data='sums', target_modules=['all'])", "(did you mean 'all-linear'?)"),
    ("finetune(model, tokenizer, data='sums', adapter_path='a.safetensors')", "a name without .safetensors"),
    ("finetune(model, tokenizer, data='sums', log='print')", "log must be a function or None"),
    ("finetune(model, tokenizer, data=[('a', 'b')])", "data:1: a list, not an object"),
    ("finetune(model, tokenizer, data=__import__('io').StringIO('x'))", "an open file; give its path"),
    ("finetune(model, tokenizer, data='sums,text')", "give several one by one, without commas: sums text"),
    ("finetune(model, tokenizer, data='*.csv')", "patterns are not expanded"),
    ("finetune(model, tokenizer, data={'prompt': ['a'], 'completion': ['b']})", "is one dict (prompt"),
    ("finetune(model, tokenizer, data=[{'review': 'a film', 'stars': 5}])", '"completion": "{stars}"}'),
    ("sweep_rates(model, tokenizer, data='sums', epochs=2)", "(did you mean 'iters'?)"),
    ("complete(model, tokenizer, 'hi', max_new_tokens=5)", "(did you mean 'max_tokens'?)"),
    ("load('tiny', adapter='run')", "load takes no adapter (did you mean 'adapter_path'?)"),
    ("load('https://huggingface.co/org/name')", "give its hub id, org/name"),
    ("preview('sums', model=model)", "give its name, or tokenizer=tokenizer"),
    ("preview('sums', model=None)", "preview: model is None; give the name of a model"),
    ("preview(None)", "preview: data is None; give a path or a hub id"),
    ("preview(data=None)", "preview: data is None; give a path or a hub id"),
    ("evaluate(model, tokenizer, data=None)", "evaluate: data is None; give a path or a hub id"),
    ("sweep_rates(model, tokenizer, data=None)", "data is None; give a path or a hub id"),
    ("find_rate(model, tokenizer, data=None)", "data is None; give a path or a hub id"),
    ("plan_memory(data=None)", "plan_memory: data is None; give a path or a hub id"),
    ("plan_memory(None)", "plan_memory: model is None; give the name of a model"),
    ("finetune(model, tokenizer, model=None)", "finetune: model is None; give the name of a model"),
    ("load(None)", "load: name is None; give the name of a model"),
    ("load(None, None)", "load: name is None; give the name of a model"),
    # keywords of the dataclasses of settings
    ("AdapterConfig(r=8)", "AdapterConfig takes no r (did you mean 'rank'?)"),
    ("AdapterConfig(rnk=8, alfa=2)", "takes no rnk (did you mean 'rank'?); takes no alfa (did you mean 'alpha'?)"),
    ("AdapterConfig(lora_alpha=8)", "(did you mean 'alpha'?)"),
    ("OptimizerConfig(lr=1e-3)", "OptimizerConfig takes no lr (did you mean 'learning_rate'?)"),
    ("OptimizerConfig(zzz=1)", "OptimizerConfig takes no zzz; it takes optimizer, learning_rate,"),
    ("DataConfig(max_length=8)", "DataConfig takes no max_length (did you mean 'max_seq_length'?)"),
    ("TrainConfig(num_train_epochs=8)", "TrainConfig takes no num_train_epochs (did you mean 'epochs'?)"),
    ("TrainConfig(r=8)", "TrainConfig takes no r (did you mean adapter=AdapterConfig(rank=…)?)"),
    ("TrainConfig(batch_size=8)", "(did you mean data=DataConfig(batch_size=…)?)"),
    # GGUF
    ("load_adapter(model, 'model.gguf')", 'model.gguf is a model, not an adapter: give it as model="model.gguf"'),
    ("preview('sums', model='run')", 'model="run" holds an adapter, not a model: give its model'),
    ("plan_memory('run')", 'model="run" holds an adapter, not a model: give its model'),
    # arguments left out, or in one tuple
    ("finetune('tiny', data='sums')", "model, tokenizer = mlx_loraplus.load('tiny') loads both"),
    ("finetune((model, tokenizer), data='sums')", "write * before it, as in finetune(*loaded)"),
    ("complete('tiny', 'hi')", "model, tokenizer = mlx_loraplus.load('tiny') loads both"),
    ("evaluate('run', data='sums')", "model, tokenizer = mlx_loraplus.load('run') loads both"),
    ("finetune(model, data='sums')", "finetune needs tokenizer too; model, tokenizer = mlx_loraplus.load(name)"),
    ("finetune(data='sums')", "finetune needs model and tokenizer too"),
    ("complete(model, tokenizer)", "complete needs prompt too"),
    ("LoRAPlus(ml.OptimizerConfig())", "LoRAPlus needs total_steps too"),
    ("attach_adapters(model)", "attach_adapters needs config too"),
    # splits
    ("finetune(model, tokenizer, data={'test': [{'text': 'a'}]})", "no training rows, only test; training rows have the key 'train'"),
    ("evaluate(model, tokenizer, data={'test': [{'text': 'a'}]})", 'data from Python has no valid rows: give data={"valid": rows}, because rows without'),
    ("finetune(model, tokenizer, train_dataset='sums')", "(did you mean 'data'?)"),
    ("finetune(model, tokenizer, rows='sums')", "(did you mean 'data'?)"),
    # lists in one text
    ("finetune(model, tokenizer, data='sums', fields='prompt=a completion=b')", "is 2 pairs in one text: write them apart"),
    ("finetune(model, tokenizer, data='sums', fields='prompt=a,completion=b')", "is 2 pairs in one text: write them apart"),
    ("finetune(model, tokenizer, data='sums', target_modules='none')", "target_modules must have at least 1 item, not 'none'"),
    ("finetune(model, tokenizer, data='sums', target_modules='q_proj z_proj')", "nothing matches 'z_proj'"),
    ("finetune(model, tokenizer, data='sums', verbose=True)", "(verbosity is a flag of the command mlx_loraplus.train alone: leave it out)"),
    ("plan_memory(families='nothere')", "a hub id or a folder goes to model"),
    ("plan_memory(families='model.gguf')", 'write model="model.gguf"'),
    ("attach_adapters(model, ml.AdapterConfig(target_modules=('q_prj',)))", "(did you mean 'q_proj'"),
    # models, functions and settings in the place of something else
    ("finetune(nn.Linear(3, 3), tokenizer, data='sums')", "the model, a Linear, is not a language model of mlx-lm, because it has no layers"),
    ("finetune(nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 128)), tokenizer, data='sums')", "because it takes no cache"),
    ("complete(nn.Linear(3, 3), tokenizer, 'hi')", "is not a language model of mlx-lm"),
    ("attach_adapters(nn.Linear(3, 3), ml.AdapterConfig())", "is not a language model of mlx-lm"),
    ("load_adapter(nn.Linear(3, 3), 'run')", "is not a language model of mlx-lm"),
    ("finetune(model, tokenizer, data='sums', model=model)", "the model is the first argument, so leave out model"),
    ("finetune(model, tokenizer, data=model)", "data is a model (Model); give a path"),
    ("finetune(model, tokenizer, data='sums', adapter=ml.AdapterConfig(rank=4))", "which holds settings (adapter, init, rank, alpha, …): give them as keywords, without adapter"),
    ("finetune(model, tokenizer, data='sums', config=ml.TrainConfig())", "give them as keywords, without config"),
    ("finetune(model, tokenizer, data='sums', eval_dataset='sums')", "in Python data={'train': rows, 'valid': rows}"),
    ("finetune(model, tokenizer, data='sums', trackers=['wandb'])", "(did you mean 'report_to'?)"),
    ("finetune(model, tokenizer, data='sums', fields={'prompt': print})", "fields must be a valid string, not a builtin_function_or_method"),
    ("finetune(model, tokenizer, data='sums', callback=lambda event: None)", "callback is called with 2 values (Run, dict), but the function takes (event)"),
    ("finetune(model, tokenizer, data='sums', log=lambda: None)", "log is called with 1 value (str), but the function takes ()"),
    ("finetune(model, tokenizer, data=[[{'text': 'a'}], [{'text': 'b'}]])", "a list of lists of rows: name its splits, {'train': rows, 'valid': rows}"),
    ("finetune(model, tokenizer, data=[{'text': 'a'}, 'b'])", "data[0] is a dict, but data[1] is a whole data set ('b')"),
    ("evaluate(model, tokenizer, data='sums', base=ml.evaluate(model, tokenizer, data='sums', split='train'))", "base scores 40 train examples, and this evaluation 6 valid examples"),
    # half a surrogate pair
    ("complete(model, tokenizer, 'a\\ud800')", "has characters that are not valid UTF-8"),
    ("finetune(model, tokenizer, data='sums', prompts=['a\\ud800'])", "has characters that are not valid UTF-8"),
    ("Run.load('a\\ud800')", "folder must be valid UTF-8"),
    # the checkpoints of a run
    ("finetune(model, tokenizer, data='sums', adapter_path='run/checkpoints')", "among the checkpoints of a run: give adapter_path a folder of its own"),
    ("finetune(model, tokenizer, data='sums', adapter_path='run/checkpoints/best-000001', overwrite=True)", "among the checkpoints of a run"),
    ("save_adapter(tuned, 'run/checkpoints/new')", "among the checkpoints of a run"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "told"), PYTHON, ids=[call for call, _ in PYTHON])
def test_a_plausible_mistake_in_python(in_workshop: Path, call: str, told: str):
    model, tokenizer = ml.load("tiny")
    tuned, _ = ml.load("run")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(ml.LoRAPlusError) as error:
        eval(
            f"ml.{call}",
            {"ml": ml, "nn": nn, "model": model, "tokenizer": tokenizer, "tuned": tuned},
        )
    said = str(error.value)
    assert told in said
    assert "\n" not in said
    assert not re.search(
        r"--(?!from|list-models|model BASE|adapter-path gguf|save-path imported)", said
    ), said
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "meant"), [("sweep_rate", "sweep_rates"), ("finetun", "finetune")]
)
def test_a_name_that_does_not_exist(name: str, meant: str):
    with pytest.raises(AttributeError, match=f"did you mean '{meant}'"):
        getattr(ml, name)


def test_gradients_that_do_not_fit_the_optimizer(in_workshop: Path):
    model, _ = ml.load("tiny")
    trainable = ml.attach_adapters(model, ml.AdapterConfig())
    optimizer = ml.LoRAPlus(ml.OptimizerConfig(), 10)
    gradients: Any = model.trainable_parameters()
    with pytest.raises(
        ml.ConfigError, match=r"differ from what trains in 28 parameters: model.*no group"
    ):
        optimizer.init(model, {})
    optimizer.init(model, trainable.groups)

    with pytest.raises(ml.ConfigError, match="the gradients lack 28 parameters, such as model"):
        optimizer.update(model, {})
    with pytest.raises(ml.ConfigError, match=r"takes the model, then the gradients"):
        optimizer.update(gradients, model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match=r"28 parameters given to init, such as .* call init"):
        optimizer.update(ml.load("tiny")[0], gradients)


def test_an_adapter_that_is_not_finite_is_not_saved(in_workshop: Path):
    tuned, _ = ml.load("run")
    tuned.update(tree_map(lambda array: array * mx.nan, tuned.trainable_parameters()))
    with pytest.raises(ml.AdapterError, match=r"lora_a holds values that are not finite"):
        ml.save_adapter(tuned, "new")
    assert not Path("new").exists()


def test_the_tokenizer_of_another_model(in_workshop: Path, capsys: pytest.CaptureFixture[str]):
    model, _ = ml.load("tiny")
    _, other = ml.load("swapped")
    ml.evaluate(model, other, data="sums", answers=0)
    assert "warning: the tokenizer gives other ids than the one" in capsys.readouterr().err
    _, copy = ml.load("tiny")
    ml.evaluate(model, copy, data="sums", answers=0)
    assert not capsys.readouterr().err


def test_an_interrupted_run_is_continued_by_the_advice(in_workshop: Path, tmp_path: Path):
    model, tokenizer = ml.load("tiny")
    settings: Any = {"data": "sums", "iters": 2, "warmup": 0, "adapter_path": str(tmp_path / "new")}

    def stop(run: ml.Run, event: dict[str, Any]) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        ml.finetune(model, tokenizer, callback=stop, **settings)
    with pytest.raises(ml.ConfigError, match=r"continue that one, .* with resume=True"):
        ml.finetune(model, tokenizer, **settings)
    assert ml.finetune(model, tokenizer, resume=True, **settings).finished
    with pytest.raises(ml.ConfigError, match="to train them further"):
        ml.finetune(model, tokenizer, **settings | {"adapter_path": str(tmp_path / "second")})
