"""Examples and prompts that a model can't hold are refused, with the token, the row and the table's size."""

import json
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2, llama
from transformers import AutoTokenizer

from mlx_loraplus import chat, cli, generate, train
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.data.model_limits import Limits, limits_of
from tests.conftest import TinyModel
from tests.training.tiny_runs import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    from scripts.tiny_model import write_sums, write_tiny_model

    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    return Place(tmp_path)


def add_token(place: Place, count: int = 40) -> None:
    """Add tokens to the tokenizer beyond the model's 128 rows, and one of them to the fourth training row."""
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    tokenizer.add_tokens([f"<|{number}|>" for number in range(count)])
    tokenizer.save_pretrained(place.folder / "model")
    lines = (place.folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps({"prompt": "1 + 1 =", "completion": " <|39|>"}) + "\n"
    (place.folder / "data" / "train.jsonl").write_text("".join(lines))


def gpt2_place(place: Place, positions: int) -> None:
    """Make the model one with a learned table of positions."""
    config = {
        "model_type": "gpt2", "n_ctx": positions, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": positions,
        "layer_norm_epsilon": 1e-5, "vocab_size": 128,
    }  # fmt: skip
    (place.folder / "model" / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model: nn.Module = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    mx.save_safetensors(
        str(place.folder / "model" / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        {"format": "mlx"},
    )


def test_a_token_beyond_the_embedding_is_refused_everywhere(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    add_token(place)
    model, data = str(place.folder / "model"), str(place.folder / "data")
    told = (
        r"train.jsonl:4: token 137 \('<\|39\|>'\) is beyond the model's embedding of 128 rows \(ids"
        r" 0 to 127\)"
    )
    with pytest.raises(ml.DataError, match=told):
        place.run()
    loaded, tokenizer = ml.load(model)
    with pytest.raises(ml.DataError, match=told):
        ml.evaluate(loaded, tokenizer, split="train", data=data)
    with pytest.raises(ml.DataError, match=told):
        ml.sweep_rates(loaded, tokenizer, data=data, adapter_path=str(place.folder / "sweep"))
    assert ml.preview(data, model=model).data.problems[0].partition(": ")[0] == "train.jsonl:4"
    assert not ml.preview(data, tokenizer).data.problems  # without the model its limits are unknown
    words = ["--model", model, "--data", data, "--adapter-path", str(place.folder / "out")]
    for command in (train.main, cli.sweep, lambda words: train.main([*words, "--dry-run"])):
        with pytest.raises(SystemExit) as stop:
            command(words)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", model, "--prompt", "<|39|>"])
    assert stop.value.code == 2
    assert "error: the prompt: token 137 ('<|39|>')" in capsys.readouterr().err


def test_a_chat_continues_after_a_token_beyond_the_embedding(place: Place, capsys, monkeypatch):
    import io

    add_token(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("<|39|>\n1 + 1 =\n"))
    chat.main(["--model", str(place.folder / "model"), "--max-tokens", "2"])
    assert "error: the prompt: token 137" in capsys.readouterr().out


def test_a_token_that_was_cut_off_is_accepted(place: Place):
    add_token(place)
    row = json.dumps({"prompt": "1 + 1 =", "completion": " 2" * 20 + "<|39|>"}) + "\n"
    (place.folder / "data" / "train.jsonl").write_text(row * 4)
    place.run("cut", iters=1, max_seq_length=24)
    with pytest.raises(ml.DataError, match=r"4 examples hold such tokens, train.jsonl:1 first"):
        place.run("whole", iters=1)


def test_a_prompt_of_the_settings_beyond_the_embedding_is_refused(place: Place):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    tokenizer.add_tokens([f"<|{number}|>" for number in range(40)])
    tokenizer.save_pretrained(place.folder / "model")
    with pytest.raises(ml.DataError, match="the prompt: token 137"):
        place.run(prompts=["<|39|>"], iters=1)


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3", "gemma2", "mixtral", "llama4", "qwen3", "qwen3_moe", "cohere"]
)
@pytest.mark.parametrize("bits", [None, 4])
def test_the_tables_are_found_in_every_family(tiny: TinyModel, kind: str, bits: Any):
    from mlx_loraplus.adapters.attach import attach_adapters
    from mlx_loraplus.config import AdapterConfig

    model = tiny(kind, bits=bits)
    limits = limits_of(model)
    assert (limits.embedding, limits.logits, limits.positions) == (128, 128, None)
    if kind != "llama4":
        attach_adapters(model, AdapterConfig(rank=4, target_modules=("embed_tokens",)))
        assert limits_of(model) == limits


def test_a_small_head_limits_only_the_supervised_tokens(place: Place):
    from mlx_loraplus.config import TrainConfig
    from mlx_loraplus.data.load_data import load_data
    from mlx_loraplus.data.model_limits import check_examples
    from mlx_loraplus.settings import configure

    add_token(place)
    _, tokenizer = ml.load(str(place.folder / "model"))
    examples = load_data(
        configure(TrainConfig, {"data": str(place.folder / "data")}), tokenizer, "train"
    ).examples
    check_examples(Limits(embedding=138, logits=138), dict(examples), tokenizer)
    with pytest.raises(
        ml.DataError, match=r"train.jsonl:4: token 137 .* the model's head of 137 rows"
    ):
        check_examples(Limits(embedding=138, logits=137), dict(examples), tokenizer)


def test_examples_beyond_the_context_are_counted(place: Place):
    config = json.loads((place.folder / "model" / "config.json").read_text())
    (place.folder / "model" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 18})
    )
    run = place.run(iters=1)
    _, tokenizer = ml.load(str(place.folder / "model"))
    lengths = load_data(run.config, tokenizer, "train").examples["train"].lengths
    count = int((lengths > 18).sum())
    assert 0 < count < len(lengths)
    assert place.told_with("train exam") == (
        f"warning: {count} of {len(lengths)} train examples are longer than this model's context of"
        f" 18 tokens (the longest has {lengths.max()}); use max_seq_length=18"
    )
    place.run("short", iters=1, max_seq_length=18)
    assert not [line for line in place.told if "model's context" in line]


def test_rope_scaling_stretches_the_context():
    args = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 20, "max_position_embeddings": 64,
    }  # fmt: skip
    assert limits_of(llama.Model(llama.ModelArgs(**args))).context == 64
    scaling = {"type": "linear", "factor": 4.0}
    assert limits_of(llama.Model(llama.ModelArgs(**args, rope_scaling=scaling))).context == 256


def test_examples_beyond_a_table_of_positions_are_refused_and_the_advice_works(place: Place):
    gpt2_place(place, 20)
    with pytest.raises(
        ml.DataError, match=r"this model has 20 learned positions.* use max_seq_length=16$"
    ):
        place.run(iters=1)
    run = place.run(iters=2, max_seq_length=16, grad_checkpoint="off")
    assert run.finished
    assert all(loss < 10 for _, loss in run.losses("valid_loss"))


def test_an_answer_ends_with_the_table_of_positions(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    gpt2_place(place, 20)
    model, tokenizer = ml.load(str(place.folder / "model"))
    ml.complete(model, tokenizer, "1 + 2 =", max_tokens=200)
    assert "the answer is limited to" in capsys.readouterr().err
    with pytest.raises(ml.DataError, match="20 learned positions for prompt and answer together"):
        ml.complete(model, tokenizer, "1" * 30)


def test_examples_beyond_a_window_that_is_not_applied_are_counted(place: Place):
    """mlx-lm gives every layer of a Mistral full attention, whatever window its config has."""
    path = place.folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": 14}
    path.write_text(json.dumps(config))
    place.run(iters=1)
    assert "longer than the sliding window of 14 tokens" in place.told_with("train exam")
    place.run("short", iters=1, max_seq_length=14)
    assert not [line for line in place.told if "sliding window" in line]


def test_a_sample_prompt_is_checked_before_the_run_has_a_folder(place: Place) -> None:
    add_token(place)
    (place.folder / "data" / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 20)
    told = r"the prompt: token 137 \('<\|39\|>'\) is beyond the model's embedding"
    with pytest.raises(ml.DataError, match=told):
        place.run(prompts=["Add <|39|>"])
    assert not (place.folder / "run").exists()

    # A dry run reports it, too
    settings = {"model": str(place.folder / "model"), "prompts": ["Add <|39|>"]}
    problems = ml.preview(str(place.folder / "data"), **settings).data.problems
    assert "the prompt: token 137" in problems[0]


def test_the_tokenizer_of_another_model_is_refused_although_its_usual_tokens_have_rows(
    place: Place,
) -> None:
    config = json.loads((place.folder / "model" / "tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    vocabulary |= {f"word {number}": len(vocabulary) + number for number in range(40)}
    (place.folder / "model" / "tokenizer.json").write_text(json.dumps(config))

    told = "vocabulary of 138 tokens, and the model's embedding has 128 rows"
    with pytest.raises(ml.DataError, match=told):
        place.run()
    loaded, tokenizer = ml.load(str(place.folder / "model"))
    with pytest.raises(ml.DataError, match=told):
        ml.evaluate(loaded, tokenizer, split="train", data=str(place.folder / "data"))
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", str(place.folder / "model"), "--prompt", "1 + 1"])
    assert stop.value.code == 2
