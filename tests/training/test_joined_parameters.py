"""Small arrays are joined in memory alone: files hold each parameter under its own name."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_loraplus.adapters.stored_files import read_weights
from mlx_loraplus.training import joined_parameters
from mlx_loraplus.training.checkpoint import checkpoint_folder
from mlx_loraplus.training.joined_parameters import JoinedParameters
from tests.conftest import same
from tests.training.tiny_runs import Place, adapter_of, keep_loops

# The norm of the gradients is summed in another order if arrays are joined, so it has other bits.
UNCLIPPED: dict[str, Any] = {"max_grad_norm": 0.0}
FILES = ("adapters.safetensors", "trained.safetensors", "state.safetensors")


def files_of(folder: Path) -> dict[str, dict[str, mx.array]]:
    return {name: read_weights(folder / name) for name in FILES}


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_files_are_the_same_as_without_joining(
    optimizer: str, place: Place, monkeypatch: pytest.MonkeyPatch
):
    loops = keep_loops(monkeypatch)
    joined = place.run("joined", optimizer=optimizer, **UNCLIPPED)
    monkeypatch.setattr(joined_parameters, "_MOST", 0)
    alone = place.run("alone", optimizer=optimizer, **UNCLIPPED)

    # The rules of the first run have few arrays, and those of the second have one per parameter.
    few, many = (
        [len(m.joined) + len(m.alone) for m in loop.state.optimizer._members.values()]
        for loop in loops
    )
    assert few == [1, 1]
    assert min(many) > 10

    # Names, shapes, types and numbers are equal.
    one, other = (checkpoint_folder(run.folder, 6) for run in (joined, alone))
    for name, arrays in files_of(one).items():
        assert same(arrays, read_weights(other / name)), name
    assert same(adapter_of(joined), adapter_of(alone))


def test_the_state_has_the_names_and_shapes_of_the_parameters(place: Place):
    run = place.run()
    files = files_of(checkpoint_folder(run.folder, 6))
    trained, state = files["trained.safetensors"], files["state.safetensors"]
    own = {"step", "learning_rate"}
    expected = dict.fromkeys(own, ())
    for group in ("lora_a", "lora_b"):
        expected |= {f"{group}.{name}": () for name in own}
        for name, array in trained.items():
            if name.endswith(group):
                expected |= {f"{group}.{name}.{moment}": array.shape for moment in ("m", "v")}
    assert {name: array.shape for name, array in state.items()} == expected


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_a_checkpoint_written_without_joining_is_resumed_with_it_and_the_other_way_round(
    most: int, place: Place, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = place.run("one", **UNCLIPPED)
    monkeypatch.setattr(joined_parameters, "_MOST", most)
    place.run("two", stop_at=3, **UNCLIPPED)
    monkeypatch.setattr(joined_parameters, "_MOST", (1 << 20) - most)
    resumed = place.run("two", resume=True, **UNCLIPPED)
    assert same(adapter_of(resumed), adapter_of(undisturbed))


def test_arrays_are_joined_by_type_up_to_a_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joined_parameters, "_MOST", 10)
    shapes = {"a": (2, 3), "b": (4,), "c": (3, 2), "d": (11,), "e": (2,)}
    arrays = {name: mx.random.normal(shape) for name, shape in shapes.items()}
    arrays["e"] = arrays["e"].astype(mx.bfloat16)
    members = JoinedParameters(arrays, join=True)
    assert list(members.joined.values()) == [["a", "b"], ["c"], ["e"]]
    assert members.alone == ["d"]
    assert same(members.split(members.join(arrays)), arrays)
