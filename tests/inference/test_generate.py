"""Many prompts are answered as one by one, whatever the caches of a family."""

import json
from pathlib import Path

import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.inference.generate import _print_once, answer_all, complete, load
from mlx_loraplus.models.loading import load_folder_tokenizer
from scripts.tiny_model import write_tiny_model
from tests.conftest import TinyModel

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "llama4"])
def test_a_batch_of_prompts_has_the_answers_of_each(tmp_path: Path, tiny: TinyModel, kind: str):
    """Llama 4's caches can't be joined to those of a batch."""
    model = tiny(kind)
    tokenizer = load_folder_tokenizer(write_tiny_model(tmp_path))
    prompts = [tokenizer.encode(text) for text in ("1 + 1 =", "a much longer prompt", "?")]
    together = answer_all(model, tokenizer, prompts, max_tokens=4)
    alone = [answer_all(model, tokenizer, [prompt], max_tokens=4)[0] for prompt in prompts]
    assert together == alone
    assert any(together)
    marked = answer_all(model, tokenizer, prompts, max_tokens=4, cut_mark="…")
    assert all(answer in (text, f"{text}…") for answer, text in zip(marked, alone, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_is_refused(
    tmp_path: Path, tiny: TinyModel, value: float
) -> None:
    model = tiny("llama")
    model.model.norm.weight[0] = value
    tokenizer = load_folder_tokenizer(write_tiny_model(tmp_path))
    with pytest.raises(ModelError, match=r"NaN instead of probabilities: its array model\.norm"):
        complete(model, tokenizer, "1 + 1 =", max_tokens=4)


def test_a_note_about_a_model_is_told_once_and_by_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "rope_scaling": YARN | {"truncate": False}}
    (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setenv("MLX_RANK", "1")
    load(folder)
    assert not capsys.readouterr().err
    _print_once.cache_clear()
    monkeypatch.setenv("MLX_RANK", "0")
    load(folder)
    load(folder)
    assert capsys.readouterr().err.count("truncate false") == 1
