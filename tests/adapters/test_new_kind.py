"""A new kind of adapter needs one file and two entries, in config.KINDS and in attach._LAYERS."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx_loraplus

PACKAGE = Path(mlx_loraplus.__file__).parent

GAIN = '''
"""y = g (W x + s B A x), g = 1 at the start, which it keeps."""

from typing import Any, ClassVar

import mlx.core as mx

from .base_layers import LINEARS, WHOLE, base_shape
from .lora import LoRALinear, SavedActivations


class GainLinear(LoRALinear):
    groups: ClassVar = {**LoRALinear.groups, "gain": "lora_b"}
    saved_activations: ClassVar = SavedActivations(inputs=1, outputs=1, rank=2)
    frozen_extras: ClassVar = ("gain",)

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(base, rank), "gain": (base_shape(base)[0],)}

    def update_derived(self) -> None:
        self.gain = self._start = mx.ones(base_shape(self.base)[0])

    def __call__(self, x: mx.array) -> mx.array:
        return self.gain * super().__call__(x)

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        return self.gain[part, None] * super().merged(weight, part)


LAYERS = {LINEARS: GainLinear}
'''

USE = """
from dataclasses import replace
from pathlib import Path

from mlx_loraplus import AdapterError, ConfigError, fuse_adapter, load_adapter, save_adapter  # before mlx

import mlx.core as mx
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.export.gguf_lora import write_lora
from mlx_loraplus.export.peft import write_peft
from mlx_loraplus.settings import configure
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from tests.conftest import make_model

config, _ = parse(TrainConfig, Switches, ["--adapter", "gain", "--warmup", "0"], "train")
assert (config.adapter.rank, config.optimizer.learning_rate) == (8, 5e-4)
model, tokens = make_model("llama"), mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50]])
before, planned = model(tokens), measure(model, config.adapter)
trainable = attach_adapters(model, config.adapter)
assert mx.array_equal(model(tokens), before)
measured = measure(model, config.adapter)
assert sorted(measured.trained) == sorted(planned.trained)
assert measured.shared == planned.shared == sum(adapter._start.size for adapter in find_adapters(model).values())
plain = measure(make_model("llama"), configure(TrainConfig, {}).adapter).blocks[0]
ends = [adapter.base.weight.shape[0] for adapter in find_adapters(model.layers[0]).values()]
assert measured.blocks == planned.blocks
assert (planned.blocks[0].inputs, planned.blocks[0].outputs) == (plain.inputs, plain.outputs + sum(ends) + 7 * 2 * 8)
with pytest.raises(ConfigError, match="^gain has no dropout 0.1: leave it and weight_decay out$"):
    parse(TrainConfig, Switches, ["--adapter", "gain", "--dropout", "0.1"], "train")
with pytest.raises(ConfigError, match="^gain has no dropout 0.1"):
    attach_adapters(make_model("llama"), replace(config.adapter, dropout=0.1))
with pytest.raises(ConfigError, match="^gain has no dropout 0.0"):
    configure(TrainConfig, {"adapter": "gain", "weight_decay": 0.5})
optimizer = LoRAPlus(config.optimizer, total_steps=1)
optimizer.init(model, trainable.groups)
accumulate, step = make_step(model, make_loss(find_trunk_and_head(model)), optimizer, compiled=False)
step(*accumulate((tokens[:, :-1], mx.arange(8), tokens[0, 1:], mx.ones(8)), None), mx.array(8.0))
model.eval()
wanted = model(tokens)
assert mx.abs(wanted - before).max() > 1e-4
loaded = load_adapter(make_model("llama"), save_adapter(model, Path("saved")))
assert mx.array_equal(loaded(tokens), wanted)
for write in (lambda: write_peft(model, "base", Path("peft")), lambda: write_lora(model, Path("lora.gguf"))):
    with pytest.raises(AdapterError, match="can't express this adapter: gain on model.layers"):
        write()  # only W + s L R can be exported
fuse_adapter(loaded)
assert mx.abs(loaded(tokens) - wanted).max() < 1e-5
embedding, _ = parse(TrainConfig, Switches, ["--adapter", "gain", "--target-modules", "embed_tokens"], "train")
for ask in (attach_adapters, measure):
    with pytest.raises(ConfigError, match="gain can't adapt"):
        ask(make_model("llama"), embedding.adapter)
"""


# File: the line of the kind that is there already, and what the new kind adds before it
ENTRIES = {
    "config.py": ('    "lora": KindFacts(),', """    "gain": KindFacts(
        refused={("dropout", "weight_decay"): "gain has no dropout {dropout}: leave it and weight_decay out"}
    ),"""),
    "adapters/attach.py": ('"dora": dora.LAYERS,', '"gain": gain.LAYERS,'),
}  # fmt: skip


def test_a_new_kind_is_one_file_and_two_entries(tmp_path: Path):
    """A copy of the package selects, plans, trains, saves and fuses it, and refuses unsupported uses."""
    shutil.copytree(
        PACKAGE, tmp_path / "mlx_loraplus", ignore=shutil.ignore_patterns("__pycache__")
    )
    package = tmp_path / "mlx_loraplus"
    (package / "adapters" / "gain.py").write_text(GAIN)
    for name, (known, entry) in ENTRIES.items():
        text = (package / name).read_text(encoding="utf-8")
        assert known in text
        (package / name).write_text(
            text.replace(known, f"{entry} {known}" if "\n" not in entry else f"{entry}\n{known}")
        )
    types = (package / "setting_types.py").read_text(encoding="utf-8")
    (package / "setting_types.py").write_text(
        types.replace('Literal["lora", ', 'Literal["gain", "lora", ')
    )
    attach = (package / "adapters" / "attach.py").read_text(encoding="utf-8")
    (package / "adapters" / "attach.py").write_text(
        attach.replace("import dora, lora", "import dora, gain, lora")
    )
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("COV")
    }  # the copy is not measured
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=env, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
