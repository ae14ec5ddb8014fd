"""Load a model and its tokenizer from a folder. Only this module calls mlx-lm's loaders."""

import copy
import glob
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..device import on_gpu
from ..errors import ModelError, counted
from ..failures import failure_of
from .config_problems import explain_problem
from .config_translation import check_config, for_mlx_lm, load_config
from .find_model import missing_file, unreadable_file
from .layer_kinds import check_runs
from .rope_parameters import without_unread_rope
from .skeleton import read_config
from .tokenizer_problems import explain_tokenizer_problem
from .vocabulary import set_vocabulary
from .weight_files import check_packed, check_tied_head, find_packed, index_tensors, one_line

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
"""Each ``quant_method`` that mlx-lm either converts to its own layers or refuses."""

_QUANTIZED_ARRAYS = {"weight", "scales", "biases", "bias"}


def load_folder(
    path: Path, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a model's folder and return (model, tokenizer, config).

    On a CPU, all floating-point weights are converted to float32. Code in the folder is never
    run.

    Args:
        path: The folder.
        prepare: Called with the model before any weight is read.

    Raises:
        ModelError: A file is missing, truncated or broken, or mlx-lm can't run the model as its
            config requires.
    """
    model, config = load_base(path, prepare)
    tokenizer = load_folder_tokenizer(path)
    set_vocabulary(model, tokenizer)
    return model, tokenizer, config


def load_base(
    path: Path, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model's folder without its tokenizer, and return (model, config).

    The arguments and errors are the same as for ``load_folder``.
    """
    # Check the files first, because mlx-lm does not detect every error in them.
    missing = missing_file(path)
    if missing:
        raise ModelError(f"the folder {path} is not a model: {missing}")
    stored = read_config(path / "config.json")
    tensors = index_tensors(path)
    _check_layers(stored, len(tensors), path)

    # Make the model without reading its weights.
    try:
        original = load_config(path)
        check_packed(original, tensors)
        model, config = _load_unread(path, original)
        check_config(model, config)
        check_runs(model, config)
        check_quantized(model)
        check_tied_head(model, tensors)
        if not on_gpu():
            model.set_dtype(mx.float32)  # bfloat16 and float16 are ~40 times slower on CPU
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from problem
    # mlx-lm's model classes may raise any kind of error for an unexpected config.
    except Exception as problem:
        if failure_of(problem) is not None:
            raise
        has_quantization = stored.get("quantization") or stored.get("quantization_config")
        packed = None if has_quantization else find_packed(tensors)
        if packed is not None:
            raise ModelError(
                f"{path} can't be loaded by mlx-lm: its weights are quantized ({packed}), but its"
                " config.json has no quantization_config: get the folder again, or use a version"
                " of the model in bfloat16"
            ) from problem
        raise _not_loaded(path, problem, stored) from problem

    # Read the weights
    if prepare is not None:
        prepare(model)
    try:
        mx.eval(model.parameters())
    except Exception as problem:  # for example, a truncated file
        if failure_of(problem) is not None:
            raise
        raise ModelError(f"{path} can't be read: {one_line(problem)}") from problem
    return model, without_unread_rope(config, original, model)


def load_stock(path: Path) -> nn.Module:
    """Load a model's folder exactly as mlx-lm does; its arrays are read when they are used.

    Raises:
        ModelError: mlx-lm can't load the folder.
    """
    try:
        with _without_wildcards(path) as folder:
            model, _ = load_model(folder, lazy=True, trust_remote_code=False)
    # mlx-lm may raise any kind of error for unexpected weights.
    except Exception as problem:
        raise ModelError(f"mlx-lm can't load this model ({one_line(problem)})") from problem
    return model


def load_folder_tokenizer(path: Path) -> TokenizerWrapper:
    """Load the tokenizer of a model's folder, without the model.

    Raises:
        ModelError: The tokenizer can't be loaded, or transformers refuses the folder's config.json.
    """
    if unreadable := unreadable_file(path):
        raise ModelError(f"the tokenizer in {path} can't be loaded: {unreadable}")
    stored = read_config(path / "config.json")
    try:
        ends = load_config(path).get("eos_token_id")
        settings = {"trust_remote_code": False} | _config_for_tokenizer(path, stored)
        return load_tokenizer(path, settings, eos_token_ids=ends)
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from problem
    # transformers checks the model's config before it reads the tokenizer.
    except StrictDataclassError as problem:
        reason = problem.__cause__ or problem
        raise ModelError(
            f"{path / 'config.json'} contradicts itself or holds a wrong value:"
            f" {str(reason).rstrip('.')}; correct these fields, or get the folder again"
        ) from problem
    # transformers may raise any kind of error for an unexpected tokenizer.
    except Exception as problem:
        reason = explain_tokenizer_problem(path, problem)
        raise ModelError(f"the tokenizer in {path} can't be loaded: {reason}") from problem


def _config_for_tokenizer(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the argument ``config`` for the tokenizer of a family that transformers does not know.

    It is empty for other families. transformers would otherwise check all fields of config.json,
    although only a few concern the tokenizer.
    """
    if config["model_type"] in CONFIG_MAPPING:
        return {}
    names = ("model_type", "model_name", "tokenizer_class")
    fields: dict[str, Any] = {name: config[name] for name in names if name in config}
    fields["name_or_path"] = str(path)
    return {"config": PreTrainedConfig(**fields)}


def stored_dtypes(path: Path) -> dict[str, mx.Dtype]:
    """Return name → stored type for each floating-point parameter in a model's folder.

    No weight is read.

    Raises:
        ModelError: See ``load_folder``.
    """
    config = load_config(path)
    try:
        model, _ = _load_unread(path, config)
    except ModelError:
        raise
    except Exception as problem:
        if failure_of(problem) is not None:
            raise
        raise _not_loaded(path, problem, config) from problem

    # The type of an array is known before the array is read.
    arrays: Any = tree_flatten(model.parameters())
    return {name: array.dtype for name, array in arrays if mx.issubdtype(array.dtype, mx.floating)}


def _not_loaded(path: Path, problem: Exception, config: dict[str, Any]) -> ModelError:
    """Return the error for a model that mlx-lm can't make or fill with weights."""
    if explanation := explain_problem(config, problem):
        return ModelError(f"{path} can't be loaded by mlx-lm: {explanation}")
    return ModelError(
        f"{path} can't be loaded by mlx-lm: {one_line(problem).rstrip('.:')}; its config.json and"
        " its weights may not belong together: get the folder again, or use another model"
    )


def check_quantized(model: nn.Module) -> None:
    """Check that every packed weight of a model can be dequantized here.

    Raises:
        ModelError: A quantized layer has an unknown array, or a plain layer has packed weights.
    """
    for path, module in model.named_modules():
        # Check the layers of MLX or mlx-lm that have packed weights.
        is_quantized = "Quantized" in type(module).__name__ and "scales" in module
        if is_quantized:
            unknown = sorted(set(module) - _QUANTIZED_ARRAYS)
            if unknown:
                raise ModelError(
                    f"its quantized layer {path} has an array {unknown[0]!r} that is not known"
                    f" here; allowed are {', '.join(sorted(_QUANTIZED_ARRAYS))}: use a version of"
                    " the model without it"
                )

        # Check the layers that should have plain weights.
        elif isinstance(module, nn.Linear | nn.Embedding):
            dtype = module.weight.dtype
            if not mx.issubdtype(dtype, mx.floating):
                raise ModelError(
                    f"its layer {path} holds values of type {dtype}, which are quantized in a way"
                    " that mlx-lm does not know: use a version of the model in bfloat16, or one"
                    " that mlx-lm has quantized"
                )
        _check_float_arrays(path, module)


def _check_float_arrays(path: str, module: nn.Module) -> None:
    """Check that the scales and biases of a layer, and the weight of a norm, are no integers.

    Raises:
        ModelError: One holds integers, with which the outputs would be wrong.
    """
    kind = type(module).__name__
    names = ["bias", "biases"]
    if kind.endswith("Norm"):
        names.append("weight")
    if "Quantized" in kind and getattr(module, "mode", "affine") == "affine":
        names.append("scales")  # those of other modes are bytes

    for name in names:
        array = module.get(name)
        if isinstance(array, mx.array) and not mx.issubdtype(array.dtype, mx.floating):
            dtype = str(array.dtype).removeprefix("mlx.core.")
            raise ModelError(
                f"its array {path}.{name} holds values of type {dtype}, where floating-point"
                " numbers are needed: get the folder again, or use another version of the model"
            )


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its arrays, so that an adapter can be applied to it."""
    shared: list[Any] = [array for _, array in tree_flatten(model.parameters())]

    # Types and groups of processes can't be copied, so the copy shares them too.
    for module in model.modules():
        shared += [value for value in vars(module).values() if isinstance(value, mx.Dtype)]
        group = getattr(module, "group", None)
        if group is not None:
            shared.append(group)
    return copy.deepcopy(model, {id(value): value for value in shared})


def _load_unread(path: Path, original: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model with mlx-lm; its arrays are read when they are used."""
    # Code in a folder is never run.
    if code := original.get("model_file"):
        raise ModelError(
            f"its config.json has model_file {code!r:.80}, code of its own, which is never run"
            " here: use a model of a family that mlx-lm knows"
        )

    # mlx-lm would load weights with an unknown quantization method as unquantized weights.
    config = for_mlx_lm(original)
    quantization = original.get("quantization_config") or {}
    method = quantization.get("quant_method")
    is_known = method in _QUANTIZATIONS or not quantization
    if "quantization" not in original and not is_known:
        if method is None and "bits" in quantization:
            raise ModelError(
                "its config.json has a quantization_config without quant_method, which mlx-lm can't"
                " read: if mlx-lm quantized the model, rename quantization_config to quantization;"
                " otherwise use a version of the model in bfloat16"
            )
        raise ModelError(
            f"its config.json has the quantization {method!r}, which mlx-lm does not know; allowed"
            f" are {', '.join(_QUANTIZATIONS)}, and mlx-lm's own: use a version of the model in"
            " bfloat16"
        )

    with _without_wildcards(path) as folder:
        return load_model(folder, lazy=True, trust_remote_code=False, model_config=config)


@contextmanager
def _without_wildcards(path: Path) -> Generator[Path]:
    """Yield a path to the same folder that contains no wildcards of glob.

    mlx-lm searches for weights with a pattern that starts with the folder's path. With a path such
    as ``model[1]``, it would find no weights, or those of another folder. The yielded path is a
    link. It is needed only until mlx-lm has opened the files, because they stay open.
    """
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link


def _check_layers(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Refuse a config with more layers than there are tensors.

    mlx-lm would create all these layers before it reads the weights.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for name, value in part.items():
            if name.startswith("max_"):  # for example, Qwen's max_window_layers
                continue
            is_count = name.endswith(("layers", "n_layer")) and isinstance(value, int | float)
            if is_count and value > tensors:
                raise ModelError(
                    f"{path / 'config.json'} has {name} {value:,}, but its weights are only"
                    f" {counted(tensors, 'tensor')}"
                )
