"""What the files of a model add to its plan, and which models a plan shows."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_loraplus import plan
from mlx_loraplus.device import on_gpu
from scripts.tiny_model import write_tiny_model


def test_a_named_model_is_shown_alone(capsys: pytest.CaptureFixture[str]):
    plan.main(["--model", "gemma-3-1b", "--memory", "16GB"])
    assert "gemma-3-4b" not in capsys.readouterr().out
    assert ml.plan_memory("gemma-3-1b", "16GB").family == {}
    assert len(ml.plan_memory(memory="16GB").family) > 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_files_of_a_model_say_how_its_weights_are_stored(tmp_path: Path, dtype: mx.Dtype):
    model = write_tiny_model(tmp_path / "model")  # its config names no type
    file = model / "model.safetensors"
    weights: dict[str, Any] = mx.load(str(file))  # pyright: ignore[reportAssignmentType]
    mx.eval(weights)
    kept = {name: mx.ones_like(array) for name, array in weights.items() if "norm" in name}
    mx.save_safetensors(str(file), {k: v.astype(dtype) for k, v in weights.items()} | kept)

    # A GPU keeps the type, and a CPU computes in float32.
    planned = ml.plan_memory(str(model), "16GB")
    elements = sum(array.size for array in weights.values())
    assert planned.download == file.stat().st_size
    assert planned.memory.weights == elements * dtype.size
    assert planned.memory_plan.sizes.itemsize == dtype.size
    if not on_gpu():
        assert ml.plan_memory(str(model)).memory.weights == elements * 4

    # Without the files, the config is all there is.
    file.unlink()
    assert ml.plan_memory(str(model), "16GB").memory.weights == elements * 2
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "float32"}
    (model / "config.json").write_text(json.dumps(config))
    assert ml.plan_memory(str(model), "16GB").memory.weights == elements * 4
