"""The door to mlx-lm: whole folders load, everything else is one line, and no code of a folder ever runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.device import on_gpu
from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.gguf.convert import write_folder
from mlx_loraplus.models.loading import load_folder, load_folder_tokenizer
from mlx_loraplus.models.skeleton import config_of
from tests.conftest import cpu_limit
from tests.models.gguf_files import write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_folder(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model", "float32")
    return tmp_path / "model"


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(on_gpu(), reason="a GPU keeps the stored types")
def test_on_a_cpu_all_floating_weights_are_float32(folder: Path, tmp_path: Path):
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # pyright: ignore[reportAssignmentType]
    half = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
    mx.eval(half)  # the file is written over
    mx.save_safetensors(str(folder / "model.safetensors"), half)
    model, _, _ = load_folder(folder)
    assert {array.dtype for array in dict(tree_flatten(model.parameters())).values()} == {
        mx.float32
    }

    (tmp_path / "4bit").mkdir()
    write_folder(tmp_path / "tiny.gguf", tmp_path / "4bit", "4bit")
    model, _, _ = load_folder(tmp_path / "4bit")
    embedding = dict(tree_flatten(model["model"]["embed_tokens"]))
    types = {name: array.dtype for name, array in embedding.items()}
    assert types == {"weight": mx.uint32, "scales": mx.float32, "biases": mx.float32}


def test_weights_cut_anywhere_are_told(folder: Path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors is broken or cut short"):
            load_folder(folder)
    file.write_bytes(whole + b"more")
    with pytest.raises(ModelError, match="file not fully covered"):
        load_folder(folder)
    file.write_bytes(whole[:8] + b"!" * 20 + whole[28:])
    with pytest.raises(ModelError, match="invalid JSON in header"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config.pop("hidden_size"), "can't be loaded by mlx-lm: .*hidden_size"),
        (lambda config: config.pop("model_type"), "has no model_type"),
        (
            lambda config: config.update(model_type="abacus"),
            "mlx-lm has no models of type 'abacus'",
        ),
        (
            lambda config: config.update(num_hidden_layers=1),
            r"config\.json contradicts itself .*`num_hidden_layers` \(1\) .*`layer_types`",
        ),
        (
            lambda config: config.update(num_hidden_layers=7),
            r"its config\.json has 7 layers, but layer_types has 6 entries",
        ),
        (
            lambda config: config.update(num_hidden_layers=1, layer_types=None),
            "can't be loaded by mlx-lm: Received .* not in model",
        ),
        (
            lambda config: config.update(num_hidden_layers=7, layer_types=None),
            "can't be loaded by mlx-lm: Missing .* parameters",
        ),
        (
            lambda config: config["layer_types"].append(config["layer_types"].pop() + "s"),
            r'has "full_attentions" in layer 5 \(layer_types\), a type that .* llama does not know',
        ),
        (
            lambda config: config.update(bos_token_id="first"),
            r"config\.json contradicts itself or holds a wrong value: .*'bos_token_id'",
        ),
        (lambda config: config.update(eos_token_id=-1), "its eos_token_id is -1; allowed are a"),
        (
            lambda config: config.update(eos_token_id=[10**30]),
            "its eos_token_id is .10000.*allowed",
        ),
        (lambda config: config.update(model_type="cache"), "can't be loaded by mlx-lm: Attribute"),
        (
            lambda config: config.update(num_hidden_layers=10**9),
            "num_hidden_layers 1,000,000,000, but its weights are only 56 tensors",
        ),
        (
            lambda config: config.update(text_config={"n_layers": 1e300}),
            "n_layers .* only 56 tensors",
        ),
        (
            lambda config: config.update(hidden_size=64),
            "can't be loaded by mlx-lm: .* get the folder again, or use another model",
        ),
        (
            lambda config: config.update(hidden_size="wide"),
            "has hidden_size 'wide'; allowed is a whole number of at least 1",
        ),
        (
            lambda config: config.update(quantization={"bits": 4}),
            "can't be loaded by mlx-lm: KeyError",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    folder: Path, change: Callable[[dict], object], told: str
):
    change_config(folder, change)
    with pytest.raises(ModelError, match=told) as raised:
        load_folder(folder)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_not_json_is_told(folder: Path):
    config = (folder / "config.json").read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        (folder / "config.json").write_text(config, encoding)
        with pytest.raises(ModelError, match=r"config\.json is not JSON: .*(utf|UTF)-8"):
            load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_folder(folder)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"model_type": 3}'])
def test_a_config_of_no_model_is_told_to_who_plans_with_it(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json has no model_type"):
        config_of(str(tmp_path))


def test_a_missing_or_broken_tokenizer_is_told(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* can't be loaded"):
        load_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"the tokenizer in .* can't be loaded"):
        load_folder(folder)


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path):
    ran = tmp_path / "ran"
    for name in ("code.py", "tokenization.py"):
        (folder / name).write_text(
            f"from pathlib import Path\nPath({str(ran)!r}).touch()\nraise SystemExit\n"
        )
    copy = shutil.copytree(folder, tmp_path / "copy")
    change_config(folder, lambda config: config.update(model_file="code.py"))
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        load_folder(folder)
    tokenizer_config = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer_config |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["tokenization.Evil", None]},
    }
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    with pytest.raises(ModelError, match="contains custom code"):
        load_folder(copy)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("what", ["a link that leads nowhere", "not an ordinary file", "a folder"])
def test_what_is_no_file_is_told_at_once(folder: Path, name: str, what: str):
    (folder / name).unlink()
    if "link" in what:
        (folder / name).symlink_to("nowhere")
    elif what == "a folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)
    with cpu_limit(), pytest.raises(ModelError, match=f"its {name} is {what}"):
        load_folder(folder)
    if name != "model.safetensors":
        with cpu_limit(), pytest.raises(ModelError, match=f"its {name} is {what}"):
            load_folder_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.scales",
        "model.layers.1.self_attn.q_proj.biases",
    ],
)
def test_whole_numbers_in_place_of_scales_and_norms_are_refused(
    folder: Path, tmp_path: Path, name: str
):
    """MLX computes with them, and stock mlx-lm answers with nonsense."""
    (tmp_path / "4bit").mkdir()
    write_folder(tmp_path / "tiny.gguf", tmp_path / "4bit", "4bit")
    file = str(tmp_path / "4bit" / "model.safetensors")
    weights: dict[str, mx.array] = mx.load(file)  # pyright: ignore[reportAssignmentType]
    load_folder(tmp_path / "4bit")
    weights[name] = weights[name].astype(mx.int32)
    mx.eval(weights)  # the file is written over
    mx.save_safetensors(file, weights)
    with pytest.raises(ModelError, match=f"its array {name} holds values of type int32"):
        load_folder(tmp_path / "4bit")
