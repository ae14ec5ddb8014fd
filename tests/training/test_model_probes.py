"""What a run finds out about its model is stored, and a resumed run reuses it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import pydantic
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.kernels.patch import find_gated_mlps, memory_efficient
from mlx_loraplus.kernels.row_masks import takes_caches
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.training.checkpoint import checkpoint_folder, find_checkpoint, read_checkpoint
from mlx_loraplus.training.model_probes import ModelProbes, probe_model
from tests.conftest import CONFIGS, TinyModel, same
from tests.training.test_self_consistency import family
from tests.training.tiny_runs import Place, adapter_of, without_times

PACKED: dict[str, Any] = {"pack": True, "grad_checkpoint": "on", "max_seq_length": 64}
PROBES = (
    "mlx_loraplus.training.finetune.probe_model",
    "mlx_loraplus.training.step_choices.is_checkpoint_sound",
    "mlx_loraplus.training.make_batches.check_packing",
    "mlx_loraplus.training.self_consistency.is_checkpoint_sound",
    "mlx_loraplus.kernels.patch._computes",
)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was tried again")


def change_identity(folder: Path, change: Any) -> None:
    """Change what a checkpoint stores of its run, with a checksum that is right."""
    path, sums = folder / "state.json", folder / "SHA256SUMS"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    state = json.loads(path.read_text())
    change(state["identity"])
    path.write_text(json.dumps(state))
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(before, after))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_verdicts_give_the_split_that_was_found(tiny: TinyModel, kind: str):
    model = tiny(kind)
    attach_adapters(model, AdapterConfig(rank=4))
    probes = probe_model(model, pack=True)
    assert probes.trunk_and_head(model) == find_trunk_and_head(model)
    assert probes.takes_caches == takes_caches(model)
    assert probes.gated_mlps == find_gated_mlps(model)
    assert probes.match(model)


@pytest.mark.parametrize("name", ["gpt2", "mamba", "nemotron_h", "rwkv7"])
def test_verdicts_on_a_trunk_that_is_no_plain_module_can_be_stored(name: str):
    model, tokens = family(name), mx.array([[1, 2, 3]])
    stored = json.loads(json.dumps(asdict(probe_model(model, pack=False))))
    probes = pydantic.TypeAdapter(ModelProbes).validate_python(stored)
    trunk_and_head = probes.trunk_and_head(model)
    assert trunk_and_head is not None
    assert probes.match(model)
    assert mx.allclose(trunk_and_head.head(trunk_and_head.trunk(tokens)), model(tokens), atol=1e-4)


def test_a_run_stores_the_verdicts(place: Place):
    run = place.run(iters=2, **PACKED)
    checkpoint = find_checkpoint(run.folder, print)
    assert checkpoint is not None
    probes = checkpoint.identity.probes
    assert isinstance(probes, ModelProbes)
    assert probes.gated_mlps
    assert probes.head is not None
    assert (probes.takes_caches, probes.checkpoint_sound) == (True, True)

    start = json.loads((run.folder / "history.jsonl").read_text().splitlines()[0])
    assert start["probes"]["gated_mlps"] == probes.gated_mlps
    assert start["probes"]["head"] == vars(probes.head)
    assert start["probes"]["takes_caches"] is True
    assert start["probes"]["checkpoint_sound"] is True


def test_a_resumed_run_reuses_the_verdicts(place: Place, monkeypatch: pytest.MonkeyPatch):
    undisturbed = place.run("one", **PACKED)
    place.run("two", stop_at=3, **PACKED)
    for name in PROBES:
        monkeypatch.setattr(name, refuse)
    resumed = place.run("two", resume=True, **PACKED)
    assert resumed.finished
    assert same(adapter_of(resumed), adapter_of(undisturbed))
    assert without_times(resumed.history) == without_times(undisturbed.history)


def test_a_verdict_holds_even_if_the_probe_would_now_say_otherwise(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("mlx_loraplus.kernels.patch._computes", lambda *_: False)
        undisturbed = place.run("one")
        place.run("two", stop_at=3)
    resumed = place.run("two", resume=True)
    checkpoint = read_checkpoint(checkpoint_folder(resumed.folder, 6))
    assert checkpoint.identity.probes is not None
    assert checkpoint.identity.probes.gated_mlps == {}
    assert same(adapter_of(resumed), adapter_of(undisturbed))


def forget(identity: dict[str, Any]) -> None:
    """Store what version 0.1.0 stored."""
    del identity["probes"]
    identity["recompute"] = identity.pop("grad_checkpoint")


def age(identity: dict[str, Any]) -> None:
    identity["versions"]["mlx"] = "0.1"
    identity["probes"]["gated_mlps"] = {}


def rename(identity: dict[str, Any]) -> None:
    identity["probes"]["head"]["layer"] = "somewhere.else"


def renumber(identity: dict[str, Any]) -> None:
    identity["probes"]["head"]["candidate"] = 99


def regate(identity: dict[str, Any]) -> None:
    mlps = identity["probes"]["gated_mlps"]
    mlps.update(dict.fromkeys(mlps, "garden"))


@pytest.mark.parametrize("change", [forget, age, rename, renumber, regate])
def test_verdicts_that_are_missing_or_old_are_found_again(place: Place, change: Any):
    undisturbed = place.run("one")
    place.run("two", stop_at=3)
    change_identity(checkpoint_folder(place.folder / "two", 3), change)
    resumed = place.run("two", resume=True)
    assert "resume: from step 3 of 6" in place.told
    assert same(adapter_of(resumed), adapter_of(undisturbed))
    probes = [
        read_checkpoint(checkpoint_folder(run.folder, 6)).identity.probes
        for run in (undisturbed, resumed)
    ]
    assert probes[0] == probes[1] is not None


def test_a_nested_context_changes_nothing(tiny: TinyModel):
    model = tiny("llama")
    kinds = [type(module) for module in model.modules()]
    with memory_efficient(model, {}), memory_efficient(model):
        assert [type(module) for module in model.modules()] == kinds
    with memory_efficient(model):
        inside = [type(module) for module in model.modules()]
        with memory_efficient(model):
            assert [type(module) for module in model.modules()] == inside
        assert [type(module) for module in model.modules()] == inside
    assert inside != kinds
    assert [type(module) for module in model.modules()] == kinds
