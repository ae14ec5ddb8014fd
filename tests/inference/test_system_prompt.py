"""The system prompt of the training rows goes with the adapter, and prompts are encoded with it as in training."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mlx_loraplus as ml
from mlx_loraplus import cli
from mlx_loraplus.command_config import ChatConfig
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.eval_prompts import choose_format
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.export.ollama import modelfile
from mlx_loraplus.inference.chat import Conversation
from mlx_loraplus.models.loading import load_folder_tokenizer
from mlx_loraplus.models.prompt_format import PromptFormat, format_of
from mlx_loraplus.settings import configure
from tests.training.tiny_runs import Place

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def row(system: str | None, prompt: str = "1 + 1 =") -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "2"}]
    return {
        "messages": messages
        if system is None
        else [{"role": "system", "content": system}, *messages]
    }


def write(place: Place, rows: list[dict[str, Any]], *, template: bool = True) -> None:
    if template:
        (place.folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    (place.folder / "data" / "train.jsonl").write_text(lines)
    (place.folder / "data" / "valid.jsonl").write_text(lines)


def format_and_first_row(place: Place) -> tuple[PromptFormat, list[str], list[int], Any]:
    tokenizer = load_folder_tokenizer(place.folder / "model")
    config = configure(TrainConfig, {"data": str(place.folder / "data")})
    examples = load_data(config, tokenizer, "train").examples["train"]
    found, notes = choose_format(examples, tokenizer)
    example = examples[0]
    prompt = example.tokens[: int(example.supervised.argmax())].tolist()
    return found, notes, prompt, tokenizer


def test_a_prompt_is_the_prefix_of_the_training_rows(place: Place):
    write(place, [row("Be brief. ", f"{n} + 1 =") for n in range(4)])
    found, notes, prompt, tokenizer = format_and_first_row(place)
    assert found.system == "Be brief. "
    assert "Be brief" in notes[0]
    assert encode_prompt("0 + 1 =", tokenizer, form=found) == prompt
    assert PromptFormat.read(json.loads(json.dumps(found.stored()))) == found


@pytest.mark.parametrize("kind", ["completion", "alpaca", "question"])
def test_without_a_chat_template_too(place: Place, kind: str):
    names = {
        "completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "question": ("question", "answer"),
    }
    prompt_name, answer_name = names[kind]
    rows = [{prompt_name: f"{n} + 1 =", answer_name: " 2", "system": "Be brief."} for n in range(4)]
    write(place, rows, template=False)
    found, _, prompt, tokenizer = format_and_first_row(place)
    assert found.form == kind
    assert encode_prompt("0 + 1 =", tokenizer, form=found) == prompt


def test_most_rows_decide(place: Place):
    write(place, [row("A"), row("A"), row("A"), row("B"), row(None)])
    assert format_and_first_row(place)[0].system == "A"
    write(place, [row(None), row(None), row("A")])
    found, notes, *_ = format_and_first_row(place)
    assert (found.system, found.mixed_systems, notes) == (None, False, [])
    write(place, [row("A"), row("B"), row("C")])
    found, notes, *_ = format_and_first_row(place)
    assert (found.system, found.mixed_systems) == (None, True)
    assert "different system prompts" in notes[0]


def test_generate_chat_fuse_and_export_use_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(place, [row("Be brief.", f"{n} + 1 =") for n in range(8)])
    place.run("run", iters=2)
    run = str(place.folder / "run")

    def answer(*words: str) -> str:
        cli.generate([*words, "--prompt", "1 + 1 =", "--max-tokens", "6"])
        return capsys.readouterr().out

    own, none = answer(run), answer(run, "--system", "")
    assert own == answer(run, "--system", "Be brief.")
    assert own != none
    model, tokenizer = ml.load(run)
    assert ml.complete(model, tokenizer, "1 + 1 =", max_tokens=6) + "\n" == own
    assert ml.complete(model, tokenizer, "1 + 1 =", max_tokens=6, system="") + "\n" == none

    cli.fuse([run, "--save-path", str(tmp_path / "fused"), "--sample-tokens", "0"])
    capsys.readouterr()
    assert answer("--model", str(tmp_path / "fused")) == own

    cli.export([run, "--to", "gguf", "--save-path", str(tmp_path / "gguf")])
    assert 'SYSTEM """Be brief."""' in (tmp_path / "gguf" / "Modelfile").read_text()


def test_the_form_of_alpaca_rows_goes_with_the_adapter(place: Place):
    rows = [{"instruction": f"{n} + 1 =", "output": " 2"} for n in range(8)]
    write(place, rows, template=False)
    _, _, prompt, tokenizer = format_and_first_row(place)
    run = place.run("run", iters=2, sample_rows=8)

    # The report asks with the prefix of the training row, and so do the adapter's users.
    assert tokenizer.decode(prompt) in [asked["prompt"] for asked in run.start["prompts"]]
    model, _ = ml.load(str(run.folder))
    assert encode_prompt("0 + 1 =", tokenizer, form=format_of(model)) == prompt
    conversation = Conversation(configure(ChatConfig, {"adapter_path": str(run.folder)}), Console())
    assert format_of(conversation.models["base"]).form == "alpaca"


def test_mixed_system_prompts_are_told(place: Place, capsys: pytest.CaptureFixture[str]):
    write(place, [row(f"System {n}") for n in range(4)])
    place.run("run", iters=1)
    run = str(place.folder / "run")
    cli.generate([run, "--prompt", "1 +", "--max-tokens", "2"])
    assert "different system prompts" in capsys.readouterr().err
    cli.generate([run, "--prompt", "1 +", "--max-tokens", "2", "--system", "System 1"])
    assert "system prompts" not in capsys.readouterr().err


def test_a_modelfile_without_a_template_has_it(place: Place):
    tokenizer = load_folder_tokenizer(place.folder / "model")
    found = modelfile(tokenizer, "base.gguf", None, PromptFormat(system="Be brief."))
    assert "{{ .System }}\n\n{{ .Prompt }}" in found
    assert 'SYSTEM """Be brief."""' in found
    assert "System" not in modelfile(tokenizer, "base.gguf")
