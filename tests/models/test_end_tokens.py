"""Generation ends at every end token of config.json, generation_config.json and the tokenizer."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_loraplus.data.special_tokens import closing_eos
from mlx_loraplus.errors import ModelError
from mlx_loraplus.inference.generate import answer_all, complete, load
from mlx_loraplus.models.loading import load_base, load_folder, load_folder_tokenizer
from scripts.tiny_model import CHARACTERS, SPECIAL, write_tiny_model

OF_TOKENIZER = SPECIAL.index("</s>")
OF_CONFIG, OF_GENERATION, ORDINARY = (
    len(SPECIAL) + CHARACTERS.index(character) for character in "!#a"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "model")
    set_ends(folder, OF_CONFIG, [OF_GENERATION])
    return folder


def set_ends(folder: Path, config_ids: Any, generation_ids: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config_ids}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_ids}))


def always_say(model: Any, token: int) -> None:
    """Make a model predict one token whatever it reads: its blocks add nothing, all embeddings are equal."""
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    model.model.embed_tokens.weight = mx.ones_like(model.model.embed_tokens.weight)
    rows = mx.zeros_like(model.lm_head.weight)
    rows[token] = 1.0
    model.lm_head.weight = rows


@pytest.mark.parametrize("token", [OF_CONFIG, OF_GENERATION, OF_TOKENIZER, ORDINARY])
def test_generation_ends_at_each_of_them(folder: Path, token: int):
    model, tokenizer = load(str(folder))
    always_say(model, token)
    expected = "a a a a" if token == ORDINARY else ""
    assert complete(model, tokenizer, "hello", max_tokens=4) == expected
    prompts = [tokenizer.encode("hello"), tokenizer.encode("hi")]
    assert answer_all(model, tokenizer, prompts, max_tokens=4) == [expected] * 2
    cut = f"{expected}…" if token == ORDINARY else ""
    assert answer_all(model, tokenizer, prompts, max_tokens=4, cut_mark="…") == [cut] * 2


def test_generation_ends_at_the_token_that_training_supervises(folder: Path):
    model, tokenizer = load(str(folder))
    (supervised,) = closing_eos([ORDINARY], tokenizer)
    always_say(model, supervised)
    assert complete(model, tokenizer, "hello", max_tokens=4) == ""
    for token in (OF_CONFIG, OF_GENERATION, OF_TOKENIZER):
        assert closing_eos([ORDINARY, token], tokenizer) == []


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "together"),
    [
        (5, None, 5),
        (5, 5, 5),
        ([5], [5], [5]),
        (None, 6, 6),
        ([5, 6], 6, [5, 6]),
        (5, 0, [5, 0]),
        (5, [6, 5, 7], [5, 6, 7]),
    ],
)
def test_the_config_has_both_files_end_tokens(
    folder: Path, config_ids: Any, generation_ids: Any, together: Any
):
    set_ends(folder, config_ids, generation_ids)
    ids = together if isinstance(together, list) else [together]
    assert load_base(folder)[1]["eos_token_id"] == together
    assert load_folder_tokenizer(folder).eos_token_ids == {*ids, OF_TOKENIZER}


def test_a_broken_generation_config_is_ignored_and_a_broken_id_refused(folder: Path):
    (folder / "generation_config.json").write_text("{")
    assert load_folder(folder)[2]["eos_token_id"] == OF_CONFIG
    set_ends(folder, "</s>", None)
    with pytest.raises(
        ModelError, match="eos_token_id is '</s>'; allowed are a token id or a list"
    ):
        load_folder(folder)
