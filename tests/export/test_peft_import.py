"""Adapters in PEFT's format that others wrote: what is taken over, and what is refused in a line."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from safetensors.numpy import load_file, save_file

from mlx_loraplus import AdapterError, load_adapter, save_adapter
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.export.peft import find_doubts, load_peft
from mlx_loraplus.export.peft_import_checks import find_unknown_settings
from tests.conftest import same
from tests.export.test_peft import LAYER, TOKENS, adapted, changed, make, written


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.q_proj"}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]},
        {"target_modules": ["o_proj"], "exclude_modules": ["o_proj"]}, {"exclude_modules": r".*\.1\..*"},
        {"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 4, "z_proj": 2}},
    ],
)  # fmt: skip
def test_how_modules_were_chosen_changes_nothing_that_was_saved(folder: Path, changes: dict):
    """What is adapted is what there are tensors of."""
    before = load_peft(make("llama"), folder).trainable_parameters()
    changed(folder, **changes)
    assert same(load_peft(make("llama"), folder).trainable_parameters(), before)


@pytest.mark.parametrize(
    ("kind", "merges"),
    [
        *(
            (kind, True)
            for kind in (
                "IA3",
                "LOHA",
                "LOKR",
                "ADALORA",
                "OFT",
                "BOFT",
                "HRA",
                "VERA",
                "FOURIERFT",
                "VBLORA",
            )
        ),
        *((kind, True) for kind in ("LN_TUNING", "RANDLORA", "C3A", "ROAD", "SHIRA")),
        *(
            (kind, False)
            for kind in (
                "PROMPT_TUNING",
                "PREFIX_TUNING",
                "P_TUNING",
                "MULTITASK_PROMPT_TUNING",
                "CPT",
            )
        ),
        *(
            (kind, False)
            for kind in ("ADAPTION_PROMPT", "XLORA", "POLY", "TRAINABLE_TOKENS", "something new")
        ),
    ],
)
def test_another_type_of_peft_is_named(folder: Path, kind: str, merges: bool):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM"})
    )
    with pytest.raises(
        AdapterError, match=rf"is of PEFT's type '{kind}', and only LORA can be read"
    ) as told:
        load_peft(make("llama"), folder)
    assert ("merge_and_unload" in str(told.value)) == merges
    assert "\n" not in str(told.value)


def test_an_imported_adapter_trains_saves_and_fuses(tmp_path: Path):
    from mlx_loraplus import fuse_adapter

    written(adapted("llama"), tmp_path / "peft")
    model = load_peft(make("llama"), tmp_path / "peft")

    def loss(model: nn.Module) -> mx.array:
        return mx.square(model(TOKENS)).mean()

    before = loss(model).item()
    _, gradients = nn.value_and_grad(model, loss)(model)
    moved = [
        (name, p - 0.1 * dict(tree_flatten(gradients))[name])
        for name, p in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(moved, strict=False)
    assert loss(model).item() < before
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(make("llama"), tmp_path / "ours")
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    expected = model(TOKENS)
    fuse_adapter(model)
    assert mx.abs(model(TOKENS) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": 3}, "peft_type must be a valid string"),
        ({"peft_type": "lora"}, "type 'lora', and only LORA can be read"),
        ({"r": 0}, "r must be greater"),
        ({"r": 10**400}, "r must be less"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": 5e-324}, "lora_alpha"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "nest no repetitions"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern .* nest no repetitions"),
        ({"alpha_pattern": {".*" * 12 + "x": 2}}, "may take very long .* at most 6"),
        (
            {"rank_pattern": {"q_proj": 2}},
            r"q_proj is stored with rank 4, .* has rank_pattern 2 for",
        ),
        ({"r": 8}, "is stored with rank 4, but adapter_config.json has r 8 for it"),
        ({"alpha_pattern": {"(q": 2}}, "not a regular expression"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head is in modules_to_save, but its weights are"),
    ],
)
def test_a_config_that_means_something_else_is_told(folder: Path, change: dict, told: str):
    changed(folder, **change)
    model = make("llama")
    with pytest.raises(AdapterError, match=told):
        load_peft(model, folder)
    assert not find_adapters(model)


@pytest.mark.parametrize(
    ("change", "merges"),
    [
        ({"bias": "lora_only"}, True),
        ({"fan_in_fan_out": True}, True),
        ({"layer_replication": [[0, 2]]}, True),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, True),
        ({"lora_bias": True}, False),
        ({"alora_invocation_tokens": [3]}, False),
    ],
)
def test_what_can_not_be_read_is_no_broken_config(folder: Path, change: dict, merges: bool):
    changed(folder, **change)
    with pytest.raises(
        AdapterError, match=f"is a LoRA with {next(iter(change))} .*can't be read"
    ) as told:
        load_peft(make("llama"), folder)
    assert ("merge_and_unload" in str(told.value)) == merges


def test_a_dora_of_an_embedding_is_told_as_such(tmp_path: Path):
    written(adapted("llama", adapter="dora", target_modules=("q_proj", "lm_head")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens"
    a, b, m = np.zeros((4, 128)), np.zeros((64, 4)), np.ones(64)
    theirs = {"lora_embedding_A": a, "lora_embedding_B": b, "lora_magnitude_vector": m}
    save_file(
        load_file(file) | {f"{name}.{leaf}": x.astype(np.float32) for leaf, x in theirs.items()},
        file,
    )
    with pytest.raises(AdapterError, match=r"DoRA of the embedding model\.embed_tokens.*merge_and"):
        load_peft(make("llama"), tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_an_adapter_over_another_embedding_or_head_is_refused(tmp_path: Path, name: str):
    """PEFT stores a copy of what it adapts there, such as after new tokens were added."""
    written(adapted("llama", target_modules=("embed_tokens", "lm_head")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    weight = np.array(dict(tree_flatten(make("llama").parameters()))[f"{name}.weight"])

    copy = f"base_model.model.{name}.base_layer.weight"
    save_file(tensors | {copy: weight * 1.001}, file)
    load_peft(make("llama"), tmp_path)

    weight[-1] += 1
    save_file(tensors | {copy: weight}, file)
    with pytest.raises(AdapterError, match=f"trained with another {name} than this model's"):
        load_peft(make("llama"), tmp_path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        ("int32", "holds values of type int32"),
        ("bool", "holds values of type bool"),
        ("float64", "in the type F64"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(folder: Path, part: str, dtype: str, told: str):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{LAYER}self_attn.q_proj.{part}.weight"
    save_file(tensors | {name: tensors[name].astype(dtype)}, file)
    with pytest.raises(AdapterError, match=rf"q_proj\.{part}\.weight .*{told}") as caught:
        load_peft(make("llama"), folder)
    assert "broken" not in str(caught.value)


def test_the_bias_of_another_base_is_refused(folder: Path):
    """PEFT stores it in its copy of an adapted head."""
    file = folder / "adapter_model.safetensors"
    copy = f"{LAYER}self_attn.q_proj.base_layer.bias"
    save_file(load_file(file) | {copy: np.zeros(64, np.float32)}, file)
    load_peft(make("llama"), folder)
    save_file(load_file(file) | {copy: np.ones(64, np.float32)}, file)
    with pytest.raises(
        AdapterError, match=r"trained with another model\.layers\.\d\.self_attn\.q_p"
    ):
        load_peft(make("llama"), folder)


def test_tensors_that_do_not_fit_are_told(folder: Path):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{LAYER}self_attn.q_proj.lora_A.weight"
    for change, told in (
        (
            {name: np.zeros((64, 4), np.float32)},
            r"q_proj\.lora_a has shape \(4, 64\), the model needs",
        ),
        ({name: np.zeros((2, 4, 64), np.float32)}, "is not known"),
        ({name: np.zeros((0, 64), np.float32)}, "is not known"),
        ({name.replace("q_proj", "z_proj"): tensors[name]}, "is not a layer of this model"),
        ({name.replace("lora_A.weight", "lora_C"): tensors[name]}, "is not known"),
        ({f"{LAYER}mlp.experts.1.up_proj.lora_A.weight": tensors[name]}, "every expert"),
        (
            {"base_model.model.model.embed_tokens.weight": np.zeros((3, 3), np.float32)},
            "embed_tokens",
        ),
    ):
        save_file(tensors | change, file)
        with pytest.raises(AdapterError, match=told):
            load_peft(make("llama"), folder)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="belongs to another model"):
        load_peft(make("gemma2"), folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_peft(make("llama"), folder)


def test_experts_in_two_matrices_are_split(tmp_path: Path):
    """As PEFT writes ``target_parameters``: A is (E r, in), B is (out, r E), and gate and up are one."""
    written(adapted("mixtral", rank=2), tmp_path / "peft")
    name, chance = f"{LAYER}mlp.experts", np.random.default_rng(0)
    sizes = {
        "base_layer.lora_A": (8, 64),
        "base_layer.lora_B": (192, 8),
        "lora_A": (8, 96),
        "lora_B": (64, 8),
    }
    tensors = {part: chance.normal(size=size).astype(np.float32) for part, size in sizes.items()}
    weights = {f"{name}.{part}.weight": array for part, array in tensors.items()}
    save_file(weights, tmp_path / "peft" / "adapter_model.safetensors")
    changed(tmp_path / "peft", target_modules=None)
    adapters = find_adapters(load_peft(make("mixtral"), tmp_path / "peft"))
    changes = {
        path.rpartition(".")[2]: np.array(adapter.delta()) for path, adapter in adapters.items()
    }
    for expert in range(4):
        rows, columns = slice(2 * expert, 2 * expert + 2), slice(expert, None, 4)
        both, down = (
            3.0 * tensors[f"{part}lora_B"][:, columns] @ tensors[f"{part}lora_A"][rows]
            for part in ("base_layer.", "")
        )
        for found, wanted in (
            ("gate_proj", both[:96]),
            ("up_proj", both[96:]),
            ("down_proj", down),
        ):
            np.testing.assert_allclose(changes[found][expert], wanted, atol=1e-4)


def test_a_tied_head_that_differs_from_its_embeddings_is_refused(tmp_path: Path):
    written(adapted("gemma3", target_modules=("embed_tokens",)), tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="one matrix"):
        load_peft(make("gemma3"), tmp_path / "peft")
    save_file(
        {name: array for name, array in tensors.items() if "_A" in name}, file
    )  # A alone, of both
    with pytest.raises(AdapterError, match="one matrix"):
        load_peft(make("gemma3"), tmp_path / "peft")
    save_file({name: array for name, array in tensors.items() if "lm_head" not in name}, file)
    with pytest.raises(AdapterError, match="one matrix"):
        load_peft(make("gemma3"), tmp_path / "peft")


@pytest.mark.parametrize("number", range(3))
def test_every_setting_that_peft_writes_is_known(number: int):
    golden = Path(__file__).parents[1] / "golden" / "peft" / f"theirs{number}"
    assert find_unknown_settings(golden) is None
    assert find_unknown_settings(golden / "adapter_config.json") is None
    assert not find_doubts(golden)


def test_an_unknown_variant_is_refused_and_other_unknown_settings_are_noted(folder: Path):
    assert find_unknown_settings(folder) is None
    changed(
        folder, use_xyz=False, xyz_config=None, xyz_size=0, use_qalora=False, qalora_group_size=16
    )
    load_peft(make("llama"), folder)
    assert find_unknown_settings(folder) is None

    changed(folder, xyz_size=3, xyz_config={"a": 1})
    load_peft(make("llama"), folder)
    note = find_unknown_settings(folder) or ""
    assert "has 2 settings that are not known here (xyz_config {'a': 1}, xyz_size 3)" in note

    changed(folder, use_xyz=True)
    with pytest.raises(AdapterError, match=r"is a LoRA with use_xyz True, .*merge_and_unload"):
        load_peft(make("llama"), folder)


def test_layers_of_several_ranks_get_one_rank_that_stock_mlx_lm_loads(folder: Path, tmp_path: Path):
    file, name = folder / "adapter_model.safetensors", f"{LAYER}self_attn.q_proj"
    chance, tensors = np.random.default_rng(0), load_file(file)
    wide = {"lora_A": (8, 64), "lora_B": (64, 8)}
    for part, shape in wide.items():
        tensors[f"{name}.{part}.weight"] = chance.normal(size=shape).astype(np.float32)
    save_file(tensors, file)
    changed(folder, rank_pattern={f"{name.removeprefix('base_model.model.')}": 8})

    model = load_peft(make("llama"), folder)
    path = name.removeprefix("base_model.model.")
    delta = find_adapters(model)[path].delta()
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    np.testing.assert_allclose(np.array(delta), 6 / 8 * product, atol=1e-4)
    assert {adapter.lora_matrices()[0].shape[1] for adapter in find_adapters(model).values()} == {8}

    save_adapter(model, tmp_path / "ours")
    stock = load_adapters(make("llama"), str(tmp_path / "ours"))
    stock.eval()
    assert mx.allclose(stock(TOKENS), model(TOKENS), atol=1e-4)
