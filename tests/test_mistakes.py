"""Plausible mistakes at the commands: exit code 2, one right next step, and nothing left behind."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest

from mlx_loraplus import cli
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.cli import TrainSwitches
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.errors import counted
from mlx_loraplus.interrupted_imports import LAUNCHED
from mlx_loraplus.settings import TRAIN_FLAGS
from scripts.tiny_model import write_sums, write_tiny_model
from tests.mistakes_workshop import error_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which holds a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tiny_model(tmp_path / "tiny")
    write_sums(tmp_path / "sums")
    return tmp_path


TRAIN = "train --model tiny --data sums --adapter-path out --iters 2"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("finetune --model tiny", "did you mean 'train'?"),
        ("train --model sums/train.jsonl --data sums", "is a file, not a model"),
        ("generate --model sums/train.jsonl --prompt hi", "rows go to --data"),
        ("train --model ./tinny --data sums", "there is no folder or file './tinny' (did you mean 'tiny'?)"),
        ("generate --model ./tinny --prompt hi", "(did you mean 'tiny'?)"),
        ("train --model sums --data tiny", "are --model and --data swapped?"),
        ("train --model sums/train.jsonl --data tiny", "is a file, not a model"),
        ("train --model tiny --data tiny", "are --model and --data swapped?"),
        ("train --model tiny --data sums/trian.jsonl", "(did you mean 'sums/train.jsonl'"),
        ("train tiny sums", "values follow their flags"),
        ("train --pack true", "a flag that is on or off has no value"),
        ("train —model tiny", "'—model' is not a flag (did you mean '--model'"),
        ("train --launch two", "--launch takes a whole number, not 'two'"),
        ("sweep --learning-rates 1e-4,1e-3", "with spaces between them"),
        ("train --fields prompt={Ticket Subject} --data sums --model tiny", "put quotes around a pair with spaces"),
        ("train --fields prompt=Ticket Subject --data sums --model tiny", "a pair with spaces: 'prompt=Ticket Subject'"),
        ("train --fields prompt=the text completion=b --data sums --model tiny", "spaces: 'prompt=the text'"),
        (f"{TRAIN} --rank 100000", "--rank 100000 is above 32"),
        (f"{TRAIN} --adapter-path deep/er/out --init loftq", "group size"),
        (f"{TRAIN} --resume", "out holds no run to resume"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
):
    assert told in error_of(line, capsys)


def test_a_name_given_twice_in_a_yaml_file_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "twice.yaml").write_text("model: tiny\nrank: 4\ndata: sums\nrank: 8\n")
    assert "rank is given twice" in error_of("train -c twice.yaml", capsys)


def test_an_adapter_of_peft_is_converted_as_the_error_says(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    cli.main(f"{TRAIN} --warmup 0".split())
    cli.main(["export", "out", "--to", "peft", "--save-path", "peft"])

    # Each command refuses it before its base is looked for.
    config = here / "peft" / "adapter_config.json"
    written = config.read_text()
    away = json.loads(written) | {"base_model_name_or_path": "org/far-away"}
    config.write_text(json.dumps(away))
    for line in (
        "train --model peft --data sums",
        "generate peft --prompt hi",
        "train --model tiny --data sums --resume-adapter-file peft --adapter-path more",
        "train --data sums --resume-adapter-file peft --adapter-path more",
        "chat peft",
        "fuse peft",
    ):
        said = error_of(line, capsys)
        assert "peft holds an adapter in PEFT's format" in said

    # The advice is right when followed.
    config.write_text(written)
    command = said.partition("mlx_loraplus.")[2]
    cli.main(command.split())
    cli.main(["generate", "imported", "--prompt", "1 + 1 =", "--max-tokens", "2"])


def test_an_adapter_that_mlx_lm_trained_works_in_every_command(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    from mlx_lm.lora import CONFIG_DEFAULTS, run

    (here / "text").mkdir()
    for name in ("train", "valid"):
        rows = [json.dumps({"text": f"{number} and {number}"}) + "\n" for number in range(8)]
        (here / "text" / f"{name}.jsonl").write_text("".join(rows))
    settings = {"model": "tiny", "train": True, "data": "text", "adapter_path": "stock"}
    settings |= {"iters": 2, "batch_size": 2, "num_layers": 2, "steps_per_report": 1}
    run(types.SimpleNamespace(**CONFIG_DEFAULTS | settings))
    capsys.readouterr()

    # It is no run, so it is not resumed; the advice is right when followed.
    said = error_of("train --model tiny --data sums --adapter-path stock --resume", capsys)
    assert "to start from it, give --resume-adapter-file stock and another" in said
    cli.main(f"{TRAIN} --warmup 0 --resume-adapter-file stock".split())
    assert "training starts from stock" in capsys.readouterr().out
    said = error_of("train --model tiny --data sums --adapter-path stock", capsys)
    assert "stock already holds an adapter (adapters.safetensors), but no run to resume" in said
    assert "--resume-adapter-file stock with another --adapter-path starts from it" in said
    assert "--resume continues" not in said

    cli.main(["generate", "stock", "--prompt", "1 and", "--max-tokens", "2"])
    cli.main(["fuse", "stock", "--save-path", "fused"])
    cli.main(["export", "stock", "--to", "peft", "--save-path", "as_peft"])
    cli.main(["export", "stock", "--to", "gguf", "--save-path", "as_gguf"])
    assert ml.load("fused")[0] is not None
    for made in ("as_peft/adapter_model.safetensors", "as_gguf/adapter.gguf"):
        assert (here / made).is_file()


@pytest.mark.parametrize(
    ("environment", "lines"), [({}, 1), ({LAUNCHED: "1"}, 0), ({"MLX_RANK": "1"}, 0)]
)
def test_of_several_processes_one_reports_the_translation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    lines: int,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config, _ = parse(TrainConfig, TrainSwitches, ["--max-steps", "3"], "train")
    assert config.iters == 3
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize("call", [ml.finetune, ml.evaluate])
def test_a_name_or_a_tokenizer_is_no_model(here: Path, call: Callable[..., object]):
    model, tokenizer = ml.load("tiny")
    with pytest.raises(ml.ModelError, match=r"the name 'tiny', not a model: .*load\('tiny'\)"):
        call("tiny", tokenizer, data="sums")
    with pytest.raises(ml.ModelError, match="not a model"):
        call(tokenizer, model, data="sums")
    with pytest.raises(ml.ModelError, match="the name 'tiny', not a model"):
        ml.complete("tiny", tokenizer, "hi")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("flag", ["--epochs", "--num-train-epochs"])
def test_a_length_as_a_flag_replaces_the_one_in_a_file(tmp_path: Path, flag: str):
    (tmp_path / "own.yaml").write_text("iters: 300\n")
    words = ["-c", str(tmp_path / "own.yaml"), flag, "2"]
    config, _ = parse(TrainConfig, TrainSwitches, words, "train")
    assert (config.iters, config.epochs) == (None, 2)


def test_a_number_and_its_noun_agree():
    assert [counted(number, "row") for number in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]


MISTAKES = [
    # the model
    ("train --model gguf/adapter.gguf --data sums", "adapter.gguf is a LoRA adapter, not a model: convert it"),
    ("plan --model gguf/adapter.gguf", "adapter.gguf is a LoRA adapter, not a model: convert it"),
    ("train --model nothere.gguf --data sums", "there is no file 'nothere.gguf' (did you mean "),
    ("train --model model.guf --data sums", "there is no model 'model.guf' (did you mean 'model.gguf'"),
    ("train --model gema-3 --data sums", "(did you mean 'gemma-3'"),
    ("train --model run --data sums", "holds an adapter, not a model: give its model"),
    ("train --model fused/config.json --data sums", "is a file, not a model"),
    ("plan --model nothere", "mlx_loraplus.train --list-models prints"),
    ("plan --model gemma-3 --memory lots", "is not the size of a Mac: give a size such as 16GB"),
    ("doctor --model nothere", "there is no model 'nothere'"),
    # the adapter
    ("generate gguf/adapter.gguf --prompt hi", "mlx_loraplus.export --from gguf --model BASE"),
    ("generate --model tiny --adapter-path gguf/adapter.gguf --prompt hi", "is a GGUF file: convert it first"),
    ("fuse gguf/adapter.gguf", "is a GGUF file: convert it first"),
    ("fuse tiny", "tiny is a model, not an adapter: give the folder of a run or an adapter, and --model tiny if"),
    ("export run --to ollama", "not 'ollama' (did you mean 'gguf'?)"),
    ("export run --to LM-Studio", "(did you mean 'gguf'?)"),
    ("export run --to huggingface", "(did you mean 'hub'?)"),
    ("plan sums/train.jsonl", "'sums/train.jsonl' is a file, not a model"),
    ("plan --model sums/train.jsonl", "'sums/train.jsonl' is a file, not a model"),
    ("plan run", "run is a run, not a family of models: mlx_loraplus.plan -c run/run.yaml plans with"),
    # flags with a wrong dash, and rows to validate on
    ("train --model tiny --data sums —iters 2", "'—iters' is not a flag (did you mean '--iters'?)"),
    ("train --model tiny --data sums -\u2013adapter-path=out", "'-\u2013adapter-path=out' is not a flag (did you mean '--adapter-path'?)"),
    ("train --model tiny --train sums/train.jsonl", "training data goes to --data"),
    ("train --model tiny --data sums/train.jsonl --valid sums/valid.jsonl", "name the file valid.jsonl, put it beside train.jsonl"),
    ("train --model tiny --data sums/train.jsonl --test-file t.jsonl", "name the file test.jsonl"),
    ("fine-tune --model tiny", "did you mean 'train'?"),
    ("fuse nothere", "there is no folder nothere"),
    ("fuse run run2", "there is no folder run2 (did you mean 'run'"),
    ("fuse run:much", "a weight after a colon is a number, as in run:0.7"),
    ("fuse run --model other", "run belongs to another model"),
    ("generate --model swapped --adapter-path run --prompt hi", "run was trained with another tokenizer"),
    ("chat --model swapped --adapter-path run", "run was trained with another tokenizer"),
    ("train --model swapped --data sums --adapter-path run --test", "run was trained with another tokenizer"),
    ("fuse run --model swapped", "run was trained with another tokenizer, which gave other ids to the same tokens"),
    ("fuse run grun --model swapped", "run was trained with another tokenizer"),
    ("export run --model swapped --to peft --save-path out", "run was trained with another tokenizer"),
    ("train --model swapped --data sums --adapter-path new --resume-adapter-file run", "run was trained with another"),
    ("fuse run --bits 7", "--bits must be one of"),
    ("generate sums --prompt hi", "sums holds no adapter"),
    ("generate 'Who are you?'", "there is no folder Who are you? (a prompt follows --prompt): give the folder"),
    ("chat nothere", "there is no folder nothere"),
    ("train --model tiny --data sums --adapter-path new --resume-adapter-file sums", "sums holds no adapter"),
    # folders to write
    ("train --model tiny --data sums --adapter-path sums", "sums holds data (train.jsonl): give another --adapter-path"),
    ("train --model tiny --data text --adapter-path text", "text is also read by this run"),
    ("train --model tiny --data sums --adapter-path tiny --overwrite", "tiny holds a model (model.safetensors)"),
    ("train --model tiny --data sums --adapter-path swept", "swept holds a sweep (trials.jsonl)"),
    ("train --model tiny --data sums --adapter-path run", "run already holds a run"),
    ("train --model tiny --data sums --adapter-path peft", "peft holds adapter_config.json, which no run has written"),
    ("train --model tiny --data sums --adapter-path run/run.yaml", "is a file: give a folder"),
    ("train --model tiny --data sums --adapter-path run --resume-adapter-file run --overwrite", "run is also read by this run"),
    ("train --model tiny --data sums --adapter-path /", "/ is the root of the file system: give --adapter-path a folder"),
    ("train --model tiny --data sums --adapter-path ~", "is your home folder, or contains it: give --adapter-path"),
    ("train --model tiny --data sums --adapter-path .", ". is the current folder, which holds other files"),
    ("sweep --model tiny --data sums --adapter-path / --overwrite", "/ is the root of the file system"),
    ("fuse run --save-path / --overwrite", "--save-path / is or contains"),
    ("fuse run --save-path /usr --overwrite", "/usr is a folder of the system: give --save-path a folder of its own"),
    ("export run --to peft --save-path /usr --overwrite", "/usr is a folder of the system"),
    ("export run --to peft --save-path run/run.yaml", "is a file: give a folder"),
    ("sweep --model tiny --data sums --adapter-path run", "run holds a run (history.jsonl)"),
    ("sweep --model tiny --data sums --adapter-path sums --overwrite", "sums holds data (train.jsonl)"),
    ("sweep --model tiny --data sums --adapter-path fused", "fused holds a model"),
    ("fuse run --save-path sums --overwrite", "sums holds data (train.jsonl): give another --save-path"),
    ("fuse run --save-path grun --overwrite", "grun holds a run (history.jsonl)"),
    ("fuse run --save-path run --overwrite", "--save-path run is or contains run, which is read"),
    ("fuse run --save-path tiny --overwrite", "--save-path tiny is or contains"),
    ("fuse run --save-path fused", "fused is not empty"),
    ("export run --to peft --save-path grun --overwrite", "grun holds a run (history.jsonl)"),
    ("export run --to peft --save-path fused --overwrite", "fused holds a model (model.safetensors)"),
    ("export peft --from peft --save-path fused --overwrite", "fused holds a model (model.safetensors)"),
    ("export run --to gguf --save-path sums --overwrite", "sums holds data (train.jsonl)"),
    ("compare run --save-path run/report.html", "run/report.html exists already"),
    ("compare run --save-path curves.pdf", "must end in .html, .png, .svg"),
    # exports
    ("export run --to ollama", "--to must be one of gguf, hub, peft, not 'ollama'"),
    ("export run", "give one of --to (peft, gguf, hub) and --from (peft, gguf)"),
    ("export run --to hub", "--to hub needs --repo-id OWNER/NAME"),
    ("export run --to hub --repo-id me", "--to hub needs --repo-id OWNER/NAME, not 'me'"),
    ("doctor --model run", "run holds an adapter, not a model"),
    ("train --model tiny --data sums --adapter-path peft --test", "convert it first"),
    ("train --model tiny --data sums --launch 9", "--batch-size 8 leaves some of 9 processes"),
    ("train --model hf.co/org/name --data sums", "give its hub id, org/name"),
    ("train --model tiny --data sums --quiet", "did you mean '--verbosity'?"),
    ("train --model tiny --data commas.jsonl", "remove the commas between rows"),
    ("export --from peft --adapter-path run --save-path new", "run is an adapter of this package, not of PEFT"),
    ("export --from gguf --adapter-path model.gguf --model tiny --save-path new", "model.gguf is not a LoRA"),
    ("export --from gguf --adapter-path gguf --model tiny --save-path new", "gguf is a folder: give the .gguf file"),
    ("compare run nothere", "there is no folder nothere"),
    ("serve nothere", "nothere is not a folder"),
    # data
    ("train --model tiny --data run", "it is a run: give the data that it was trained on"),
    ("train --model tiny --data broken.jsonl", "broken.jsonl:2: not JSON"),
    ("train --model tiny --data empty.jsonl", "empty.jsonl: no training rows"),
    ("train --model tiny --data odd.jsonl", "--fields prompt=input_text completion=target_text"),
    ("train --model tiny --data sums --fields map.json", "is not of the form field=column"),
    ("train --model tiny --data sums --objective dpo", "suits --objective sft"),
    ("train --model tiny --data sums --valid-split 0.1", "already has a validation split"),
    ("train --model tiny --data sums text --data-weights 1", "--data-weights has 1 value for 2 data sets: give one for each"),
    # texts and values
    ("train --model tiny --data sums --prompts nofile.txt", "prompts must be the text itself"),
    ("generate run --prompt notes.md", "prompt must be the text itself"),
    ("chat run --system system.txt", "system must be the text itself"),
    ("train --model tiny --data", "--data needs at least one value after it"),
    ("train --prompts --model tiny", "--prompts needs at least one value after it"),
    ("train --model tiny --data sums --iters", "--iters needs a value after it"),
    ("train --model tiny --data sums --optimizer adamx", "(did you mean 'adam' or 'adamw'?)"),
    ("train --model tiny --data sums --learning-rate 1e-4x", "--learning-rate takes a number or auto, not '1e-4x'"),
    ("train --model tiny --data sums --num-layers 9", "--num-layers 9 is above the model's 2 blocks"),
    ("train --model tiny --data sums --target-modules q_prog", "(did you mean 'q_proj'"),
    ("train --model tiny --data sums --iters 5 --epochs 1", "give one of them"),
    ("train -m tiny", "'-m' is not a flag (--help lists the flags)"),
    ("train run/run.yaml", "a file of settings follows -c, as in -c run/run.yaml"),
    ("sweep --model tiny --data sums --lr-ratios 0", "--lr-ratios must be greater than 0, not 0.0"),
    ("generate run --max-tokens 0", "--max-tokens must be greater than or equal to 1"),
    # settings of a file
    ("train -c typo.yaml", "modelx is not a setting (did you mean 'model'?)"),
    ("train -c values.yaml", "iters must be greater than or equal to 1, not 0; rank must be a valid integer"),
    ("train -c indent.yaml", "indent.yaml:2: 'data: sums' can't be read: begin the line without spaces"),
    ("train -c list.yaml", "must hold settings, one `name: value` a line"),
    ("train -c both.yaml", "iters and epochs both say how long to train"),
    ("train -c nested.yaml", "'training' must be one value, a list of values, or names with values"),
    ("train -c none.yaml", "lr_ratio must be a valid number"),
    ("train -c run", "give a file, such as run/run.yaml"),
    ("train -c nothere.yaml", "there is no file nothere.yaml (did you mean "),
    ("train -c run/run.yaml", "--resume continues it, --overwrite replaces it"),
    ("train --adapter-path run --resume", "because no data is given; for a new run, leave out --resume"),
    ("train -c run/run.yaml --resume --rank 4", "can't resume with other settings: rank 8 -> 4"),
    # values that are missing or too many, and flags of other commands
    ("train --kto-weights 1", "--kto-weights needs 2 values, with a space between them, after it"),
    ("train --kto-weights 1:2", "--kto-weights needs 2 values"),
    ("train --learning-rate Auto", "not 'Auto' (did you mean 'auto'?)"),
    ("train --warmup 10%", "not '10%' (it counts steps: --warmup-ratio 0.1 with --iters N is a fraction of the run)"),
    ("train --warmup 0.1", "(it counts steps: --warmup-ratio 0.1 with --iters N is a fraction of the run)"),
    ("sweep --learning-rates auto", "--learning-rates takes numbers with spaces between them, not 'auto'"),
    ("sweep --patience 3", "'--patience' is a flag of mlx_loraplus.train, and not of this command"),
    ("sweep --betas 0.1 0.5 --objective dpo", "'--betas' is not a flag (did you mean '--beta'?)"),
    ("sweep --data sums --model tiny --beta 0.5", "--beta is for --objective dpo, ipo, simpo and kto"),
    ("sweep --resume-adapter-file run --ranks 4", "--ranks can't be tried with --resume-adapter-file"),
    ("chat run --prompt hi", "'--prompt' is a flag of mlx_loraplus.generate"),
    ("train --dequantize", "'--dequantize' is a flag of mlx_loraplus.fuse"),
    ("train --stop-at 1", "'--stop-at' is not a flag (--help lists the flags)"),
    ("train --resume run", "--resume takes no value: -c run/run.yaml --resume continues this run"),
    ("train --resume sums", "--resume takes no value: it continues the run or sweep in --adapter-path"),
    ("plan --model run", "--model run holds an adapter, not a model: give its model, --model "),
    ("chat run/checkpoints", "give the folder of a run or an adapter, such as run/checkpoints/"),
    ("sweep --dry-run", "'--dry-run' is a flag of mlx_loraplus.train, and not of this command"),
    ("fuse run --verbosity quiet", "'--verbosity' is a flag of mlx_loraplus.train, and not of this command"),
    ("train --model tiny --data sums --dry-run --launch 0", "--launch must be a number of processes, 1 or more, not 0"),
    ("train --list-models gemma", "--list-models takes no value"),
    ("train run", "-c run/run.yaml --resume continues a run"),
    ("train tiny", "values follow their flags, as in --model tiny"),
    ("train sums/train.jsonl", "values follow their flags, as in --data sums/train.jsonl"),
    ("sweep sums --model tiny", "values follow their flags, as in --data sums"),
    ("doctor tiny", "values follow their flags, as in --model tiny"),
    ("serve run grun", "this command takes one folder"),
    ("chat run grun", "this command takes one folder"),
    ("generate run grun --prompt hi", "this command takes one folder"),
    ("compare run/run.yaml", "run/run.yaml is a file; give the folder of a run"),
    ("plan --memory 16 GB", "as in --memory 16GB"),
    ("fuse run 0.5", "(a weight follows its adapter and a colon, as in my_run:0.5)"),
    # commands
    ("resume run", "did you mean 'train -c RUN/run.yaml --resume'?"),
    ("trian --model tiny", "did you mean 'train'?"),
    ("--model tiny", "is not a command (did you mean 'train --model tiny'?); give one of train, generate"),
    ("--model tiny plan", "(did you mean 'plan --model tiny'?)"),
    ("--port 3", "(did you mean 'serve --port 3'?)"),
    ("-c settings.yaml", "(did you mean 'train -c settings.yaml'?)"),
    ("settings.yaml", "(did you mean 'train -c settings.yaml'?)"),
    ("run", "(did you mean 'chat run'?)"),
    ("run --prompt hi", "(did you mean 'generate run --prompt hi'?)"),
    ("mlx_loraplus.train --iters 3", "(did you mean 'train --iters 3'?)"),
    ("-V", "(did you mean '--version'?)"),
    ("--nonsense", "'--nonsense' is not a command; give one of train"),
    ("train -help", "(did you mean '--help'?)"),
    ("train --versoin", "(did you mean '--version'"),
]  # fmt: skip


def test_the_flags_of_train_that_are_not_settings_are_known():
    own = {field.name for field in dataclasses.fields(TrainSwitches)}
    assert own - {field.name for field in dataclasses.fields(Switches)} == set(TRAIN_FLAGS)


def test_there_are_many_mistakes():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_plausible_mistake(
    in_workshop: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
):
    said = error_of(line, capsys)
    assert told in said
    assert len(said) < 400


def test_a_folder_whose_name_ends_in_gguf_is_a_model(here: Path):
    write_tiny_model(here / "x.gguf")
    assert ml.load("x.gguf")[0] is not None
