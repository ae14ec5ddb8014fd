"""Evaluation against figures made by hand, and side by side on a real model."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes

from mlx_loraplus import ConfigError, DataError, complete, evaluate, load, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.training.evaluate import Answer, Evaluation
from mlx_loraplus.train import main
from scripts.tiny_model import write_tiny_model
from tests.conftest import CONFIGS, randomize_adapters
from tests.data.conftest import make_letters

ROWS = [("ab", "cd"), ("abc", "ba"), ("x", "yz"), ("a", "b" * 80)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"prompt": prompt, "completion": completion}) + "\n"
        for prompt, completion in ROWS
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return str(tmp_path)


def tiny_letters() -> tuple[nn.Module, TokenizerWrapper]:
    """Return a model with random weights that knows the letters."""
    mx.random.seed(0)
    model_class, arguments = _get_classes(config := CONFIGS["llama"] | {"vocab_size": 260})
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    return model, make_letters()


def test_rows_that_are_no_split_are_refused(data: str):
    with pytest.raises(
        ConfigError, match="split must be 'train' or 'valid' or 'test', not 'validation'"
    ):
        evaluate(*tiny_letters(), split="validation", data=data)


def test_figures_are_those_of_the_full_logits(data: str):
    model, tokenizer = tiny_letters()
    found = evaluate(model, tokenizer, split="test", data=data, batch_size=3)
    losses, right = [], []
    for prompt, completion in ROWS:
        tokens = [
            *tokenizer.encode(prompt + completion, add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
        log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for place in range(len(prompt), len(tokens)):
            losses.append(-log_p[place - 1, tokens[place]])
            right.append(log_p[place - 1].argmax() == tokens[place])
    assert (found.split, found.examples, found.tokens) == ("test", 4, len(losses))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean(right), abs=1e-6)
    assert {(answer.prompt, answer.expected) for answer in found.answers} == set(ROWS[:3]), (
        "the last one is long"
    )
    for answer in found.answers:
        alone = complete(model, tokenizer, answer.prompt, max_tokens=11)
        generated = answer.generated.removesuffix("…")  # it is cut, maybe inside a character
        assert generated.rstrip("�") == alone.rstrip("�")
    assert len(evaluate(model, tokenizer, split="test", data=data, answers=2).answers) == 2
    assert evaluate(model, tokenizer, split="test", data=data, answers=0).exact is None
    assert evaluate(model, tokenizer, split="test", data=data, train_on="everything").exact is None


def test_of_a_chat_the_last_turn_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    turns = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}))
    (answer,) = evaluate(
        tiny_letters()[0], make_letters("alpaca"), split="train", data=str(tmp_path)
    ).answers
    assert answer.prompt.endswith("### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\n")
    assert answer.expected == "d"


def test_rows_that_are_not_there(data: str):
    with pytest.raises(DataError) as error:
        evaluate(*tiny_letters(), data=data)
    assert str(error.value) == (
        f"{data} has no valid rows: add valid.jsonl to {data}, or evaluate other rows (in Python,"
        ' split="train" or "test")'
    )
    assert evaluate(*tiny_letters(), data=data, split="train", answers=0).examples
    Path(data, "valid.jsonl").write_text(Path(data, "test.jsonl").read_text())
    assert evaluate(*tiny_letters(), data=data, answers=0).split == "valid"


def test_advice_on_a_split_without_rows_fits_the_data(tmp_path: Path):
    """Advice names only splits that have rows, and files that are read."""
    rows = [{"prompt": f"{number}", "completion": "b"} for number in range(3)]
    folder = tmp_path / "data"
    folder.mkdir()
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)))

    def refused(data: Any, **settings: Any) -> str:
        with pytest.raises(DataError, match="has no test rows") as error:
            evaluate(*tiny_letters(), data=data, split="test", **settings)
        return str(error.value).partition("has no test rows")[2]

    others = ', or evaluate other rows (in Python, split="train")'
    assert refused(str(folder)) == f": add test.jsonl to {folder}{others}"
    file = ": give a folder that holds train.jsonl and test.jsonl"
    assert refused(str(train)) == file + others
    python = ': give data={"test": rows}, because rows without a split are train rows'
    assert refused(rows) == python + others
    assert (
        refused({"valid": rows}) == python + ', or evaluate other rows (in Python, split="valid")'
    )

    # The split has a file, but no rows.
    test.write_text("")
    assert refused(str(folder)) == f" in test.jsonl: add some{others}"
    test.write_text(json.dumps({"prompt": "a"}))
    left_out = f" in test.jsonl: correct them (1 bad row dropped){others}"
    assert refused(str(folder), on_bad="drop") == left_out
    test.write_text(json.dumps({"prompt": "a" * 20, "completion": "b"}))
    too_long = " in test.jsonl: raise max_seq_length (1 row dropped (longer than 8 tokens))"
    assert refused(str(folder), on_long="drop", max_seq_length=8) == too_long + others


def evaluation(loss: float, given: list[str], base: Evaluation | None = None) -> Evaluation:
    answers = [Answer(f"test.jsonl:{n}", f"p{n}", f"w{n}", text) for n, text in enumerate(given)]
    return Evaluation("test", 3, 30, loss, 0.5, answers, base)


def test_two_models_side_by_side():
    base = evaluation(2.0, ["w0 ", "x", "y", "z"])
    tuned = evaluation(0.5, ["[/wrong]", "w1", "other", " z"], base)
    assert (base.exact, tuned.exact) == (0.25, 0.25)
    assert tuned.perplexity == pytest.approx(math.exp(0.5))
    changed = [new.source for _, new in tuned.changed()]
    assert changed == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:0"], "mended first, spoilt last"
    text = str(tuned)
    for said in (
        "base",
        "tuned",
        "2.0000",
        "0.5000",
        "7.389",
        "1.649",
        "50.0%",
        "1 of 4",
        "✗ x",
        "✓ w1",
        "expected: w1",
        "✗ [/wrong]",
    ):
        assert said in text, said
    assert "model" in str(base)
    assert tuned._repr_html_().startswith("<pre")
    assert evaluation(1e9, []).perplexity < math.inf


def test_the_command_compares_an_adapter_with_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"prompt": "Say exactly: yes", "completion": "yes"},
        {"prompt": "Say exactly: no", "completion": "no"},
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = str(write_tiny_model(tmp_path / "model"))
    words = ["--model", base, "--data", str(tmp_path), "--test", "--adapter-path"]
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "none")])
    assert "holds no adapter: train one first, without --test" in capsys.readouterr().err
    model, _ = load(base)
    attach_adapters(model, AdapterConfig(rank=2))
    randomize_adapters(model, size=0.3)
    save_adapter(model, tmp_path / "run")
    main([*words, str(tmp_path / "run")])
    said = capsys.readouterr().out
    for word in (
        "2 test examples",
        "base",
        "tuned",
        "perplexity",
        "token accuracy",
        "exact answers",
        "of 2",
        "warning: 2 test rows that are in train (test.jsonl:1 = train.jsonl:1,",
    ):
        assert word in said
