"""A tiny model of one family, taken the whole way: load, plan, adapt, train, save, fuse, and load with stock mlx-lm."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_adapters, load_model, quantize_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.storage import save_adapter
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.errors import LoRAPlusError
from mlx_loraplus.export.fuse import fuse_adapter, save_fused
from mlx_loraplus.memory.estimate import estimate
from mlx_loraplus.models.skeleton import make_skeleton, read_config
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.settings import configure
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.kernels.patch import memory_efficient, grad_checkpointing
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.kernels.row_masks import takes_caches
from mlx_loraplus.training.self_consistency import check_caches, is_checkpoint_sound
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "configs.json").read_text()
)
FIRST, SECOND = [1, 5, 2, 7, 3, 9, 4, 8, 60, 31, 100, 17], [8, 44, 2, 90, 12, 6, 71, 3]
TOKENS = mx.array([FIRST, [*SECOND, 0, 0, 0, 0]])
STAGES = (
    "load", "plan", "attach", "gradients", "checkpointing", "cache", "packing", "steps", "stock adapter", "fuse",
    "fuse 4 bits", "fuse dequantized",
)  # fmt: skip
QUICK = STAGES[:5]  # what the test suite walks; scripts/judges/families walks all


class DifferentError(Exception):
    """Two ways that must agree do not."""


@dataclass
class Family:
    """A family on its way: what earlier stages made for later ones."""

    name: str
    folder: Path
    config: TrainConfig = field(
        default_factory=lambda: configure(TrainConfig, {"learning_rate": 1e-3, "warmup": 0})
    )
    model: Any = None
    tokenizer: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


def write_folder(name: str, folder: Path) -> None:
    """Write the family's tiny model with random weights, and a tokenizer of 128 tokens."""
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    try:
        model_class, args_class = _get_classes(config)
        weights: Any = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
        weights = {name: _stirred(array) for name, array in weights.items()}
    except (Exception, SystemExit):  # our loader must refuse it  # noqa: BLE001
        weights = {f"layers.{number}.weight": mx.zeros((1,)) for number in range(8)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    vocabulary = {f"<{number}>": number for number in range(128)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<0>", eos_token="<127>"
    ).save_pretrained(folder)


def _stirred(array: mx.array) -> mx.array:
    """Return an array of equal numbers, as norms, biases and gates start, with noise on it."""
    is_constant = mx.issubdtype(array.dtype, mx.floating) and (array.max() == array.min()).item()
    return array + 0.05 * mx.random.normal(array.shape) if is_constant else array


def relative(found: Any, wanted: Any) -> float:
    """Return the norm of the difference of two trees over the norm of the second."""
    pairs = list(zip(tree_flatten(found), tree_flatten(wanted), strict=True))
    gap = sum(mx.square((a - b).astype(mx.float32)).sum().item() for (_, a), (_, b) in pairs)
    size = sum(mx.square(b.astype(mx.float32)).sum().item() for _, (_, b) in pairs)
    return math.sqrt(gap / size) if size else math.sqrt(gap)


def check(what: str, error: float, most: float) -> None:
    if not error <= most:
        raise DifferentError(f"{what} differ by {error:.1e}")


def arrays_of(rows: list[list[int]]) -> tuple[mx.array, ...]:
    """Return tokens, positions, targets and weights: every next token is a target."""
    length = max(map(len, rows))
    tokens = mx.array([[*row, *[0] * (length - len(row))] for row in rows])
    places = [
        (number * length + at, row[at + 1])
        for number, row in enumerate(rows)
        for at in range(len(row) - 1)
    ]
    positions, targets = (mx.array(part) for part in zip(*places, strict=True))
    return tokens, positions, targets, mx.ones(targets.shape)


def gradients(
    model: nn.Module, loss: Callable[..., mx.array], *arrays: mx.array
) -> tuple[float, Any]:
    total, found = nn.value_and_grad(model, loss)(model, *arrays)
    mx.eval(total, found)
    return total.item(), found


def learn(model: nn.Module) -> None:
    """Give every adapter numbers that do something."""
    mx.random.seed(1)
    trained: Any = tree_flatten(model.trainable_parameters())
    model.load_weights(
        [(name, 0.1 * mx.random.normal(array.shape)) for name, array in trained], strict=False
    )


def load(family: Family) -> None:
    write_folder(family.name, family.folder)
    family.model, family.tokenizer, family.facts = load_folder(family.folder)
    family.model.eval()


def plan(family: Family) -> None:
    facts = read_config(family.folder / "config.json")
    for model, itemsize in ((make_skeleton(facts), 4), (family.model, None)):
        sizes = measure(model, family.config.adapter, itemsize)
        if sizes.vocabulary != 128:
            raise DifferentError(
                f"the plan takes {sizes.vocabulary} tokens for the vocabulary of 128"
            )
        for checkpoint in (False, True):
            parts = vars(estimate(sizes, family.config, 2, 64, checkpoint=checkpoint))
            if not all(math.isfinite(part) and part >= 0 for part in parts.values()):
                raise DifferentError(f"the plan has {parts}")


def attach(family: Family) -> None:
    model = family.model
    base = load_folder(family.folder)[0]
    attach_adapters(model, family.config.adapter)
    base.eval()
    before = base(TOKENS)
    check("logits before and after attaching", relative(model(TOKENS), before), 0.0)
    model.train()
    _, found = gradients(model, make_loss(None), *arrays_of([FIRST, SECOND]))
    idle = [
        name
        for name, array in tree_flatten(found)
        if name.endswith("lora_b") and not mx.any(array).item()
    ]
    dense = [name for name in idle if "switch" not in name and "expert" not in name]
    if dense:
        raise DifferentError(f"{len(dense)} adapters get no gradient, {dense[0]} first")
    model.eval()
    learn(model)
    if relative(model(TOKENS), before) < 1e-4:
        raise DifferentError("adapters change nothing")


def train_gradients(family: Family) -> None:
    model, arrays = family.model, arrays_of([FIRST, SECOND])
    wanted_loss, wanted = gradients(model, make_loss(None), *arrays)
    model.train()
    with memory_efficient(model):
        loss, found = gradients(model, make_loss(find_trunk_and_head(model)), *arrays)
    model.eval()
    check(
        "losses of the training path and of stock layers",
        abs(loss - wanted_loss) / wanted_loss,
        1e-4,
    )
    check("gradients of the training path and of stock layers", relative(found, wanted), 1e-4)


def checkpointing(family: Family) -> None:
    if not is_checkpoint_sound(family.model):
        return  # training leaves it out, and says so
    model, arrays = family.model, arrays_of([FIRST, SECOND])
    trunk_and_head = find_trunk_and_head(model)
    with memory_efficient(model):
        _, wanted = gradients(model, make_loss(trunk_and_head), *arrays)
        with grad_checkpointing(model):
            _, found = gradients(model, make_loss(trunk_and_head), *arrays)
    check("gradients with and without checkpointing", relative(found, wanted), 1e-4)


def cached(family: Family) -> None:
    tokens, model = mx.array([FIRST]), family.model
    check_caches(model)
    check(
        "cached and cacheless logits",
        relative(model(tokens, cache=make_prompt_cache(model)), model(tokens)),
        1e-4,
    )


def packing(family: Family) -> None:
    model = family.model
    if not takes_caches(model):
        return  # packing refuses this family, in a line
    trunk_and_head = find_trunk_and_head(model)
    tokens, positions, targets, weights = arrays_of([FIRST + SECOND])
    seam = positions == len(FIRST) - 1
    segments = mx.array([[1] * len(FIRST) + [2] * len(SECOND)])
    with memory_efficient(model):
        _, wanted = gradients(model, make_loss(trunk_and_head), *arrays_of([FIRST, SECOND]))
        packed = (tokens, positions, targets, mx.where(seam, 0.0, weights), segments)
        _, found = gradients(model, make_loss(trunk_and_head), *packed)
    check("gradients of packed and separate rows", relative(found, wanted), 1e-3)


def steps(family: Family) -> None:
    model = family.model
    before = tree_map(mx.array, model.trainable_parameters())
    optimizer = LoRAPlus(family.config.optimizer, 2)
    groups = {name: name.rsplit(".", 1)[-1] for name, _ in tree_flatten(before)}
    optimizer.init(model, groups)
    trunk_and_head, arrays = find_trunk_and_head(model), arrays_of([FIRST, SECOND])
    with memory_efficient(model):
        for _ in range(2):
            loss, found = gradients(model, make_loss(trunk_and_head), *arrays)
            optimizer.update(model, found, usable=mx.isfinite(mx.array(loss)))
            mx.eval(model.trainable_parameters(), optimizer.state)
    change = relative(model.trainable_parameters(), before)
    if not 0 < change < math.inf:
        raise DifferentError(f"two steps change the adapter by {change}")


def stock_adapter(family: Family) -> None:
    save_adapter(family.model, family.folder / "adapter")
    stock: Any = load_model(family.folder)[0]
    stock.set_dtype(mx.float32)
    stock = load_adapters(stock, str(family.folder / "adapter"))
    stock.eval()
    check(
        "logits here and in stock mlx-lm with the adapter",
        relative(stock(TOKENS), family.model(TOKENS)),
        1e-5,
    )


def _fused(family: Family, base: Path, name: str, *, exact: bool, **how: Any) -> None:
    """Fuse an adapter into the model in ``base``, and compare what stock mlx-lm loads."""
    model, tokenizer, facts = load_folder(base)
    model.eval()
    attach_adapters(model, family.config.adapter)
    learn(model)
    before = model(TOKENS)
    fuse_adapter(model, **how)
    folder = family.folder / name
    save_fused(model, tokenizer, facts, base, folder)
    stock: Any = load_model(folder)[0]
    stock.set_dtype(mx.float32)
    stock.eval()
    wanted = before if exact else model(TOKENS)
    check(
        "logits before fusing and in stock mlx-lm after it", relative(stock(TOKENS), wanted), 1e-3
    )


def fuse_plain(family: Family) -> None:
    _fused(family, family.folder, "plain", exact=True)


def fuse_at_4_bits(family: Family) -> None:
    _fused(family, family.folder, "four", exact=False, bits=4)


def fuse_dequantized(family: Family) -> None:
    model, tokenizer, facts = load_folder(family.folder)
    try:
        model, facts = quantize_model(model, facts, 32, 4)
    except (TypeError, ValueError):
        return  # mlx-lm itself can't quantize this family
    save_fused(model, tokenizer, facts, family.folder, family.folder / "q4")
    _fused(family, family.folder / "q4", "dequantized", exact=True, dequantize=True)


STEPS: dict[str, Callable[[Family], None]] = dict(
    zip(STAGES, (load, plan, attach, train_gradients, checkpointing, cached, packing, steps, stock_adapter,
                 fuse_plain, fuse_at_4_bits, fuse_dequantized), strict=True)
)  # fmt: skip


def walk(name: str, stages: tuple[str, ...] = STAGES) -> dict[str, str]:
    """Return stage → "ok", "refused: why" or "failed: how"; after a refusal nothing else is tried."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        family = Family(name, Path(folder))
        for stage in stages:
            try:
                STEPS[stage](family)
                found[stage] = "ok"
            except LoRAPlusError as refusal:
                found[stage] = f"refused: {str(refusal).replace(folder, name)}"
            except (Exception, SystemExit) as problem:  # a fault, for the table  # noqa: BLE001
                found[stage] = (
                    f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
                )
            if stage in ("load", "attach") and found[stage] != "ok":
                break
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with contextlib.redirect_stdout(sys.stderr):
            found = walk(name)
        print(json.dumps({name: found}), flush=True)
