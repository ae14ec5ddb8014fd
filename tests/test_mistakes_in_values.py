"""Plausible mistakes in values, files and names: one line, one right next step, and nothing left behind."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import json
from pathlib import Path

import pytest

from mlx_loraplus import cli
from tests.mistakes_workshop import error_of

TRAIN = "train --model tiny --adapter-path new"
DATA = " --data sums"

# Settings, files and values as people write them; ``{T}`` is a training command.
MORE_MISTAKES = [
    # numbers
    ("{T} --iters 1,000", "--iters takes a whole number, not '1,000' (write 1000)"),
    ("{T} --max-seq-length 2k", "not '2k' (write 2048)"),
    ("{T} --iters 1e3", "(write 1000)"),
    ("{T} --iters 2.5", "--iters takes a whole number, not '2.5'"),
    ("{T} --learning-rate 1,5e-4", "not '1,5e-4' (write 0.00015)"),
    ("{T} --valid-split 10%", "not '10%' (write 0.1)"),
    ("{T} --valid-split 10", "--valid-split must be less than 1, not 10.0 (10% is 0.1)"),
    ("{T} --batch-size 8GB", "--batch-size takes a whole number or auto, not '8GB'"),
    ("{T} --max-minutes 1h", "--max-minutes takes a number, not '1h'"),
    ("{T} --learning-rate nan", "--learning-rate must be a finite number"),
    ("{T} --seed 99999999999999999999", "--seed must be less than"),
    ("{T} --num-layers 0", "--num-layers must be -1 (all blocks) or at least 1"),
    ("plan --model tiny --memory 16TB", "give a size such as 16GB"),
    ("{T} --rank 16,32", "one number, or try several with mlx_loraplus.sweep --ranks 16 32"),
    ("{T} --lr-ratio 16,32", "one number, or try several with mlx_loraplus.sweep --lr-ratios 16 32"),
    ("{T} --alpha [8,16]", "one number, or try several with mlx_loraplus.sweep --alphas 8 16"),
    ("{T} --learning-rate 1e-4,1e-3", "try several with mlx_loraplus.sweep --learning-rates 1e-4 1e-3"),
    ("{T} --rank 16 32", "--rank takes one number, or try several with mlx_loraplus.sweep --ranks 16 32"),
    ("sweep --rank 16,32", "try several with mlx_loraplus.sweep --ranks 16 32"),
    ("{T} --seed 1 2", "--seed takes one number, such as 1"),
    ("{T} --seed 1,2,3", "(one number, such as 8)"),
    ("{T} --lr-ratio 0,5", "(write 0.5)"),
    ("{T} --dropout 0,1", "(write 0.1)"),
    # words
    ("{T} --adapter LoRA", "not 'LoRA' (did you mean 'lora'?)"),
    ("{T} --optimizer AdamW", "not 'AdamW' (did you mean 'adamw'?)"),
    ("{T} --objective DPO", "not 'DPO' (did you mean 'dpo'?)"),
    ("{T} --grad-checkpoint true", "must be one of auto, off, on, not 'true' (did you mean 'on'?)"),
    ("{T} --target-modules all", "nothing matches 'all' (did you mean 'all-linear'?)"),
    ("fuse run --save-path new --bits 16", "--bits must be one of 2, 3, 4, 5, 6, 8, auto, not '16'"),
    ("export run --to GGUF --save-path new", "not 'GGUF' (did you mean 'gguf'?)"),
    ("export run --to gguf --merged q4_k_m --save-path new", "must be one of f16, f32, q4_1, q5_1, q8_0"),
    # names of flags
    ("train --model tiny --output new", "did you mean '--adapter-path'?"),
    ("train --model tiny -o new", "did you mean '--adapter-path'?"),
    ("fuse run --output new", "did you mean '--save-path'?"),
    ("fuse run --quantize 4", "did you mean '--bits'?"),
    ("sweep --model tiny --epochs 1", "did you mean '--iters'?"),
    ("fuse run --export-gguf", "mlx_loraplus.export RUN --to gguf --merged f16"),
    ("fuse run --upload-repo me/x", "mlx_loraplus.export RUN --to hub"),
    ("generate run --prompt hi --top-p 0.9", "--temperature alone sets the sampling"),
    ("{T} --load-in-4bit", "give a quantized model"),
    ("{T} --deepspeed zero2.json", "--launch and --parallel train in several processes"),
    ("{T} --quantization-bit 4", "give a model of 4 bits"),
    ("version", "did you mean '--version'?"),
    ("list-models", "did you mean 'train --list-models'?"),
    ("models", "did you mean 'train --list-models'?"),
    ("{T} --load-in-4bit", "Unsloth's --load-in-4bit can't be translated"),
    ("fuse run --export-gguf", "mlx-lm's --export-gguf can't be translated"),
    ("{T} --de-quantize", "--de-quantize is --dequantize here, which this command does not have: mlx_loraplus.fuse has it"),
    ("{T} --memory 16GB", "'--memory' is a flag of mlx_loraplus.plan, and not of this command"),
    ("sweep --model tiny --test", "'--test' is a flag of mlx_loraplus.train, and not of this command"),
    ("{T} --system kind", "the rows hold system prompts, in a field system"),
    # texts without their flag
    ("generate run what is 2+2", "as in --prompt 'what is 2+2'"),
    ("generate what is 2+2", "as in --prompt 'what is 2+2'"),
    ("generate two words.jsonl what is 2", "put quotes around 'two words.jsonl', and a prompt follows --prompt, as in --prompt 'what is 2'"),
    ("generate run --prompt what is 2", "put quotes around text with spaces, as in --prompt 'what is 2'"),
    ("generate run/run.yaml", "give the adapter's folder, run"),
    ("fuse two words.jsonl", "put quotes around 'two words.jsonl'"),
    ("compare two words.jsonl run", "put quotes around 'two words.jsonl'"),
    ("chat run hello there", "mlx_loraplus.generate … --prompt 'hello there'"),
    ("plan sums", "rows go to --data, as in mlx_loraplus.plan --data sums"),
    ("doctor smollm2-135m", "as in --model smollm2-135m"),
    ("train smollm2", "as in --model smollm2-135m"),
    ("generate smollm2-135m", "a model without an adapter is given as --model smollm2-135m"),
    ("generate run 'what is 1 + 1'", "a prompt follows --prompt, as in --prompt 'what is 1 + 1'"),
    ("plan model.gguf", "write --model model.gguf"),
    ("plan tiny", "write --model tiny"),
    ("plan peft", "peft holds an adapter in PEFT's format"),
    ("doctor run", "this command takes a model: give the one of the adapter, --model "),
    ("doctor peft", "this command takes a model: give the one of the adapter, --model /"),
    ("train run", "--resume-adapter-file run starts from its adapter"),
    ("sweep peft", "to start from its adapter, give --resume-adapter-file peft"),
    ("{T} --pack=yes", "--pack takes no value, not 'yes': write --pack, or --no-pack"),
    ("{T} --on-bad=", "--on-bad must be one of drop, error, not ''"),
    ("{T} --time-limit 1h", "did you mean '--max-minutes'?"),
    ("plan gema-3", "(did you mean 'gemma-3-"),
    # files of settings
    ("train -c percent.yaml", "valid_split must be a valid number, not '10%' (write 0.1)"),
    ("train -c dashes.yaml", "batch_size is given twice"),
    ("train -c upper.yaml", "Model is not a setting (did you mean 'model'?); Data is not a setting (did you mean 'data'?)"),
    ("train -c axolotl.yaml", "data takes folders, files and hub ids, and fields their columns"),
    ("train -c preferences.yaml", "beta is for objective dpo, ipo, simpo and kto, not sft"),
    ("train -c equals.yaml", "equals.yaml:1: 'model = tiny' is not a setting, which has a colon"),
    ("train -c utf16.yaml", "utf16.yaml is not UTF-8: save it as UTF-8"),
    ("train -c run/adapter_config.json", "an adapter's config: to start from it, give --resume-adapter-file run"),
    ("train -c peft/adapter_config.json", "an adapter's config: to start from it, give --resume-adapter-file peft"),
    ("train -c tiny/config.json", "a model's config: give the model as --model tiny"),
    ("train -c run/history.jsonl", "rows go to --data"),
    ("train -c run/adapters.safetensors", "a model goes to --model, an adapter to --resume-adapter-file"),
    ("train -c typo.yaml -c list.yaml", "give one file of settings"),
    ("sweep -c run/run.yaml", "holds settings of mlx_loraplus.train"),
    ("train -c block.yaml", "train holds settings (rank, lr_ratio): write them one level up, without train"),
    ("train -c kind.yaml", "optimizer holds settings (learning_rate): write them one level up"),
    ("train -c peft.yaml", "lora_config holds settings (r, lora_alpha): write them one level up"),
    ("train -c several.yaml", "rank must be a valid integer, not '8, 16' (one number, or try several with mlx_loraplus.sweep --ranks 8 16); lr_ratio must be a valid number, not [4, 16] (one number, or"),
    ("train -c system.yaml", "a message with the role system; prompt is not a setting (a setting of mlx_loraplus.generate)"),
    ("train -c maybe.yaml", "pack must be true or false, not 'maybe'"),
    ("train -c mapping.yaml", "data must be a list of values, not {'train': 'sums'}"),
    # data
    ("{T} --data sums text --data sums", "write all its values after one --data"),
    ("{T} --data utf16.jsonl", "utf16.jsonl is UTF-16 or UTF-32: save it as UTF-8"),
    ("{T} --data latin.csv", "latin.csv:2: not UTF-8: if the file has another encoding, convert it"),
    ("{T} --data labels.csv", "--fields prompt=review completion=label;"),
    ("{T} --data mails.csv", "2 bad rows: mails.csv:2 and others: no known field"),
    ("{T} --data inside.json", "the rows are in 'data': write that list alone into the file"),
    ("{T} --data lines.txt", "lines.txt holds JSON lines, but its name ends in .txt: rename it to lines.jsonl"),
    ("{T} --data packed.jsonl", "packed.jsonl is compressed by gzip: decompress it first"),
    ("{T} --data quotes.jsonl", "a dict as Python prints it: write each row with json.dumps"),
    ("{T} --data number.jsonl", "'completion' is a number, not a string"),
    ("{T} --data empty.csv", "empty.csv: no training rows"),
    ("{T} --data header.csv", "header.csv: no training rows"),
    ("{T} --data ragged.csv", "ragged.csv:2: 3 values, but the header has 2 columns"),
    ("{T} --data two words.jsonl", "put quotes around 'two words.jsonl'"),
    ("{T} --data rows.jsonl.gz", "(decompress it first); give one of .jsonl"),
    ("{T} --data table.xlsx", "(save its sheet as .csv)"),
    ("{T} --data *.csv", "patterns are not expanded: give the files, such as empty.csv"),
    ("{T} --data sums,text", "give several one by one, without commas: sums text"),
    ("{T} --data https://example.com/train.jsonl", "download the file first"),
    ("{T} --data https://huggingface.co/datasets/org/name", "its hub id is org/name"),
    ("{T} --data pointer.jsonl", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    ("{T} --fields prompt:query completion:reply", "(write prompt=query)"),
    ("{T} --fields query=prompt reply=completion", "(the field comes first: prompt=query)"),
    ("{T} --fields prompt", "(write prompt=COLUMN)"),
    # models and folders
    ("train --model ./nope", "there is no folder or file './nope': give a hub id (org/name), a folder, a .gguf file, or a name"),
    ("plan --model nope/x.gguf", "there is no file 'nope/x.gguf': give a hub id"),
    ("train -c nope/x.yaml", "there is no file nope/x.yaml: give the path of a YAML file of settings"),
    ("doctor --model run", "--resume-adapter-file run trains the adapter further, in mlx_loraplus.train"),
    ("train --model pointed --data sums", "a pointer of Git LFS"),
    ("train --model pointer.gguf --data sums", "pointer.gguf is a pointer of Git LFS"),
    ("train --model https://huggingface.co/google/gemma-3-4b-it", "give its hub id, google/gemma-3-4b-it"),
    ("train --model pickled --data sums", "get the model as safetensors"),
    ("train --model tiny --data sums --adapter-path new.yaml", "give --adapter-path a name without .yaml"),
    ("fuse run --save-path new.gguf", "export --to gguf writes .gguf files into a folder"),
    ("export run --to gguf --save-path new.gguf", "give --save-path a name without .gguf"),
    ("fuse --model tiny --save-path new", "there is no folder adapters: give the folder of a run"),
    ("generate run --prompt a --output-dir b", "this command writes nothing"),
    ("compare run --lr 3", "--lr is --learning-rate here, which this command does not have"),
    ("sweep --model tiny --data sums --adapter-path new --valid-split 0.5", "--valid-split holds out training rows"),
    ("sweep --adapter-path swept --model tiny --data sums --iters 9 --resume", "trials.jsonl is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), MORE_MISTAKES, ids=[line for line, _ in MORE_MISTAKES])
def test_a_mistake_as_people_write_it(
    in_workshop: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
):
    line = line.replace("{T}", TRAIN if "--data" in line else TRAIN + DATA)
    said = error_of(line, capsys)
    assert told in said
    assert len(said) < 400


def test_all_problems_of_a_file_are_told_at_once(
    in_workshop: Path, capsys: pytest.CaptureFixture[str]
):
    said = error_of("train -c all.yaml", capsys)
    for told in (
        "lora holds settings (rank)",
        "mlx-lm's wandb x can't be translated",
        "foo is not a setting",
        "alpha must be a valid number, not 'high'",
        "rank must be greater than or equal to 1, not 0",
    ):
        assert told in said


@pytest.mark.parametrize("source", ["--memory", "MLX_LORAPLUS_MEMORY"])
def test_the_source_of_a_wrong_size_is_named(
    source: str,
    in_workshop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    line = "plan --model tiny"
    if source == "--memory":
        line += " --memory lots"
    else:
        monkeypatch.setenv(source, "lots")
    assert f"{source} is 'lots', which is not the size of a Mac" in error_of(line, capsys)


def test_what_is_meant_is_understood(in_workshop: Path, capsys: pytest.CaptureFixture[str]):
    (in_workshop / "marked.yaml").write_text(
        "model: tiny\ndata: sums\nbatch-size: 2\n", "utf-8-sig"
    )
    words = ["--target-modules", "['q_proj', 'v_proj']", "--print-config"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-c", "marked.yaml", *words])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "batch_size: 2" in printed
    assert "- q_proj\n- v_proj" in printed
    (in_workshop / "marked.yaml").unlink()


def test_the_advice_for_labels_is_right_when_followed(
    in_workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"review": "a great film", "stars": 4.5}, {"review": "no story at all", "stars": 2}]
    (tmp_path / "stars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"{TRAIN} --data {tmp_path / 'stars.jsonl'}"
    said = error_of(line, capsys)
    assert "--fields prompt=review 'completion={stars}';" in said

    cli.main([*line.split(), "--fields", "prompt=review", "completion={stars}", "--dry-run"])
    assert "formats: 2 completion" in capsys.readouterr().out
