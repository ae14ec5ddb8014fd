"""The one door to mlx-lm: a folder becomes a model and its tokenizer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_model, load_tokenizer
from safetensors import SafetensorError, safe_open

from ..errors import ModelError, join_problems
from .hub_config import check_config, for_mlx_lm
from .registry import missing_file
from .rope_parameters import without_unread_rope
from .skeleton import read_config

_QUANTIZATIONS = (
    "awq",
    "bitnet",
    "compressed-tensors",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
    "mxfp8",
)
"""What ``quant_method`` mlx-lm makes its own layers of, or refuses."""
_QUANTIZED_ARRAYS = {"weight", "scales", "biases", "bias"}


def load_folder(
    path: Path, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a model's folder and return (model, tokenizer, config). Without Metal, all floating weights become float32.

    Code that a folder brings along is never run. ``prepare`` sees the model before any weight is
    read.

    Raises: ModelError, in one line, when a file is missing, cut short or broken, or mlx-lm does not
    know the model.
    """
    model, config = load_base(path, prepare)
    return model, load_folder_tokenizer(path), config


def load_base(
    path: Path, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model's folder without its tokenizer and return (model, config), as ``load_folder`` does."""
    if missing := missing_file(path):
        raise ModelError(f"the folder {path} is not a model: {missing}")
    _check_layers(read_config(path / "config.json"), _count_tensors(path), path)
    try:
        original = load_config(path)
        model, config = _load_unread(path, original)
        check_config(model, config)
        check_quantized(model)
        if not mx.metal.is_available():
            model.set_dtype(mx.float32)  # bfloat16 and float16 are ~40 times slower on CPU
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from problem
    except (
        Exception
    ) as problem:  # mlx-lm's model classes answer a strange config with errors of every kind
        raise ModelError(f"{path} can't be loaded by mlx-lm: {_one_line(problem)}") from problem
    if prepare is not None:
        prepare(model)
    try:
        mx.eval(model.parameters())
    except Exception as problem:  # such as a file that ends early
        raise ModelError(f"{path} can't be read: {_one_line(problem)}") from problem
    return model, without_unread_rope(config, original, model)


def stored_dtypes(path: Path) -> dict[str, mx.Dtype]:
    """Return the type that a model's folder stores each floating parameter in; no weight is read.

    Raises: ModelError as ``load_folder`` does.
    """
    try:
        model, _ = _load_unread(path, load_config(path))
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(f"{path} can't be loaded by mlx-lm: {_one_line(problem)}") from problem
    arrays: Any = tree_flatten(model.parameters())
    return {name: array.dtype for name, array in arrays if mx.issubdtype(array.dtype, mx.floating)}


def check_quantized(model: nn.Module) -> None:
    """Raise ModelError where a layer's weight is packed in a way that its dequantization here would get wrong."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "Quantized" in kind and "scales" in module:
            if unknown := sorted(set(module) - _QUANTIZED_ARRAYS):
                raise ModelError(
                    f"its quantized layer {path} has an array {unknown[0]!r} that is not known"
                    f" here; allowed are {', '.join(sorted(_QUANTIZED_ARRAYS))}: use a version of"
                    " the model without it"
                )
        elif isinstance(module, nn.Linear | nn.Embedding) and not mx.issubdtype(
            module.weight.dtype, mx.floating
        ):
            raise ModelError(
                f"its layer {path} holds {module.weight.dtype} numbers, which are quantized in a"
                " way that mlx-lm does not know: use a version of the model in bfloat16, or one"
                " that mlx-lm has quantized"
            )


def _load_unread(path: Path, original: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model by mlx-lm; its arrays are read when they are used."""
    method = (original.get("quantization_config") or {}).get("quant_method")
    if "quantization" not in original and method not in (None, *_QUANTIZATIONS):
        raise ModelError(
            f"its config.json has the quantization {method!r}, which mlx-lm does not know; allowed"
            f" are {', '.join(_QUANTIZATIONS)}, and mlx-lm's own: use a version of the model in"
            " bfloat16"
        )
    return load_model(path, lazy=True, trust_remote_code=False, model_config=for_mlx_lm(original))


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model, to put an adapter on, over the same arrays."""
    shared = [array for _, array in tree_flatten(model.parameters())]
    shared += [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, mx.Dtype)
    ]
    shared += [
        module.group for module in model.modules() if getattr(module, "group", None) is not None
    ]  # of processes
    return copy.deepcopy(model, {id(one): one for one in shared})


def load_folder_tokenizer(path: Path) -> TokenizerWrapper:
    """Load the tokenizer of a model's folder, without the model.

    Raises: ModelError, in one line, when it can't be loaded.
    """
    read_config(path / "config.json")
    try:
        return load_tokenizer(
            path, {"trust_remote_code": False}, eos_token_ids=load_config(path).get("eos_token_id")
        )
    except (
        Exception
    ) as problem:  # transformers answers a strange tokenizer with errors of every kind
        raise ModelError(
            f"the tokenizer in {path} can't be loaded: {_one_line(problem)}"
        ) from problem


def _one_line(problem: Exception) -> str:
    """Return an error's kind and message in at most 300 characters of one line."""
    text = (
        f"{type(problem).__name__}: {problem}"
        if not isinstance(problem, ValueError)
        else str(problem)
    )
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _check_layers(config: dict[str, Any], tensors: int, path: Path) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for (
            name,
            value,
        ) in part.items():  # mlx-lm would build layer after layer before it looks at the weights
            counts = name.endswith(("layers", "n_layer")) and not name.startswith(
                "max_"
            )  # Qwen's max_window_layers
            if counts and isinstance(value, int | float) and value > tensors:
                raise ModelError(
                    f"{path / 'config.json'} has {name} {value:,}, more than the {tensors} tensors"
                    " there are"
                )


def _count_tensors(path: Path) -> int:
    """Return the number of tensors in a model's files.

    Raises: ModelError when a file's header does not describe exactly its bytes.
    """
    count, problems = 0, []
    for file in sorted(path.glob("model*.safetensors")):
        try:
            with safe_open(file, "numpy") as opened:
                count += len(opened.keys())
        except (SafetensorError, OSError) as problem:
            problems.append(f"{file} is broken or cut short ({_one_line(problem)})")
    if problems:
        raise ModelError(f"{join_problems(problems)}; get the file again")
    return count
