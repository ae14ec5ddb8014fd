"""Plausible mistakes in Python: one line, one right next step, and nothing left behind."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest


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
    ("LoRAPlus(ml.OptimizerConfig(), 9).init(tuned, {})", "lora_a is in no group: give the groups that attach_adapters returns"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "told"), PYTHON, ids=[call for call, _ in PYTHON])
def test_a_plausible_mistake_in_python(in_workshop: Path, call: str, told: str):
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


@pytest.mark.parametrize(
    ("name", "meant"), [("sweep_rate", "sweep_rates"), ("finetun", "finetune")]
)
def test_a_name_that_does_not_exist(name: str, meant: str):
    with pytest.raises(AttributeError, match=f"did you mean '{meant}'"):
        getattr(ml, name)


def test_a_run_that_failed_before_its_first_save_can_be_resumed_as_told(in_workshop: Path):
    model, tokenizer = ml.load("tiny")

    def fail(*_: object) -> None:
        raise ValueError("of the caller")

    settings = {"data": "sums", "iters": 2, "warmup": 0, "adapter_path": "failed"}
    with pytest.raises(ValueError, match="of the caller"):
        ml.finetune(model, tokenizer, callback=fail, **settings)
    with pytest.raises(ml.ConfigError, match=r"give resume=True and adapter_path='failed'"):
        ml.finetune(model, tokenizer, **settings)
    assert ml.finetune(model, tokenizer, resume=True, **settings).history[-1]["step"] == 2
    shutil.rmtree("failed")


def test_changed_files_of_an_adapter_are_not_called_those_of_another_model(in_workshop: Path):
    shutil.copytree("run", "changed")
    weights = mx.load("changed/adapters.safetensors")
    assert isinstance(weights, dict)
    cut = {name: array[:1] for name, array in weights.items()}
    mx.eval(cut)
    mx.save_safetensors("changed/adapters.safetensors", cut)
    with pytest.raises(ml.AdapterError, match=r"on this model, but its files .* --resume writes"):
        ml.load("tiny", "changed")

    # Without weights, the checkpoints are named.
    Path("changed/adapters.safetensors").unlink()
    with pytest.raises(ml.AdapterError, match=r"there is no adapters.* --resume writes it again"):
        ml.load("changed")
    shutil.rmtree("changed")
