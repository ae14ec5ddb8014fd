"""Which modules the config of an adapter selects, by PEFT's rule, and which its file holds."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mlx_loraplus import AdapterError
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.export.peft import find_doubts, load_peft
from tests.export.test_peft import LAYER, changed, make


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ("A", {}), ("B", {}), ("AB", {}), ("AB", {"target_modules": r".*_proj"}),
        ("AB", {"target_modules": r".*layers\.(0|1)\..*", "exclude_modules": r".*\.v_proj"}),
        ("AB", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        ("AB", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ],
)  # fmt: skip
def test_a_layer_that_the_file_has_lost_is_missing(folder: Path, parts: str, changes: dict):
    changed(folder, **changes)
    file = folder / "adapter_model.safetensors"
    name = f"{LAYER}self_attn.q_proj"
    lost = {f"{name}.lora_{part}.weight" for part in parts}
    save_file({key: array for key, array in load_file(file).items() if key not in lost}, file)
    model = make("llama")
    with pytest.raises(
        AdapterError, match=r"peft is incomplete: model\.layers\.\d\.self_attn\.q_proj"
    ):
        load_peft(model, folder)
    assert not find_adapters(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*k_proj"}, {"target_modules": "all-linear"}, {"target_modules": None},
        {"target_modules": r"q_proj"}, {"target_modules": r"(("}, {"target_modules": r"(.*)*q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["k_proj", "z_proj", "model.layers.7.self_attn.q_proj"]},
        {"layers_to_transform": [0, 2]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    ],
)  # fmt: skip
def test_a_layer_that_was_not_chosen_is_not_missing(folder: Path, changes: dict):
    file = folder / "adapter_model.safetensors"
    tensors = {
        key: x for key, x in load_file(file).items() if f"{LAYER}self_attn.q_proj" not in key
    }
    save_file(tensors, file)
    changed(folder, **changes)
    assert find_adapters(load_peft(make("llama"), folder))


@pytest.mark.parametrize(
    ("changes", "selected"),
    [
        ({}, None), ({"target_modules": ["q_proj"]}, 3), ({"target_modules": r".*\.q_proj"}, 3),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, 1), ({"target_modules": "q_proj"}, 0),
        ({"exclude_modules": ["q_proj"]}, 18), ({"exclude_modules": r".*layers\.1.*"}, 14),
        ({"layers_to_transform": [0, 2]}, 14), ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, 7),
        ({"layers_to_transform": []}, None), ({"target_modules": "all-linear"}, None),
    ],
)  # fmt: skip
def test_layers_that_peft_would_leave_out_are_noted(
    folder: Path, changes: dict, selected: int | None
):
    """The numbers are those of PEFT's check_target_module_exists."""
    changed(folder, **changes)
    notes = find_doubts(folder)
    assert len(notes) == (selected is not None)
    if notes:
        assert re.search(f"on 21 layers, but .* select only {selected} of them", notes[0])
        assert find_doubts(folder / "adapter_model.safetensors") == notes
