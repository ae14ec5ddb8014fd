"""A tokenizer that transformers can't load is reported with the file that keeps it from doing so."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.loading import load_folder, load_folder_tokenizer
from tests.families.walk import CONFIGS, write_folder

YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def folder_of(name: str, folder: Path, **fields: Any) -> Path:
    """Write a tiny model's folder with other fields in its config.json."""
    write_folder(name, folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | fields))
    return folder


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_a_family_that_transformers_does_not_know_may_have_any_config(tmp_path: Path, field: str):
    """transformers would want a MiniCPM with YaRN to have a field that mlx-lm does not need."""
    scaling = YARN | {"rope_theta": 1e4}
    _, tokenizer, _ = load_folder(folder_of("minicpm", tmp_path, **{field: scaling}))
    assert tokenizer.encode("<5>", add_special_tokens=False) == [5]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{", r"its tokenizer\.json is not JSON \(Expecting .*: get it again"),
        ("tokenizer.json", "[]", r"its tokenizer\.json is not a JSON object: get it again"),
        ("tokenizer.json", "{}", r"transformers can't read tokenizer\.json and tokenizer_config"),
        ("tokenizer_config.json", "3", r"its tokenizer_config\.json is not a JSON object"),
        ("special_tokens_map.json", "[3]", r"its special_tokens_map\.json is not a JSON object"),
        ("added_tokens.json", "{", r"its added_tokens\.json is not JSON"),
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
            r"its tokenizer\.json is a pointer of Git LFS",
        ),
        ("tokenizer.json", None, r"it has no tokenizer\.json: get it from where the model is"),
    ],
)
def test_a_file_of_a_tokenizer_that_is_broken_is_named(
    tmp_path: Path, file: str, content: str | None, told: str
):
    folder = folder_of("llama", tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=rf"the tokenizer in {tmp_path} can't be loaded: {told}"):
        load_folder_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"id2label": 3}, r"can't read its config\.json \(AttributeError: .*correct config\.json"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, r"config\.json \(KeyError: .*llama3"),
    ],
)
def test_a_config_that_transformers_refuses_is_named(
    tmp_path: Path, fields: dict[str, Any], told: str
):
    with pytest.raises(ModelError, match=told) as raised:
        load_folder_tokenizer(folder_of("llama", tmp_path, **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"end"', b"\xff\xfe{"])
def test_generation_config_that_is_no_object_is_named(tmp_path: Path, content: bytes):
    folder = folder_of("llama", tmp_path)
    (folder / "generation_config.json").write_bytes(content)
    for load in (load_folder, load_folder_tokenizer):
        with pytest.raises(ModelError, match=rf"{tmp_path} can't be used: its generation_config"):
            load(folder)
