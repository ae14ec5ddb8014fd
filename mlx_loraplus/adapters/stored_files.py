"""Read the files in an adapter's folder. They are untrusted, so they are checked before use."""

import json
import re
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx
import pydantic
from pydantic import Field
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, ConfigError, join_problems
from ..files import describe_contents, read_bounded
from ..models.gguf.lora_files import import_command, is_gguf, is_gguf_lora
from ..models.known_models import MODELS
from ..models.moved_run_paths import present_path, read_run_settings
from ..setting_types import AdapterKind, Scale
from ..userpaths import shell_word, similar_paths

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
MODULES = "modules.safetensors"
RUN_SETTINGS = "run.yaml"  # a run's settings, beside its adapter
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints

UNKNOWN_MODEL = "model loaded elsewhere"  # how a run describes a model without a name

DEFAULT_MODEL = "gemma-3"
"""The model of commands that are given neither a model nor an adapter."""

_TYPES = {"F32", "F16", "BF16", "BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}
"""The dtypes in safetensors that MLX reads as they are."""

_Config = TypeVar("_Config", bound=pydantic.BaseModel)


class LoRAParameters(pydantic.BaseModel):
    """``lora_parameters`` in ``adapter_config.json``.

    The names and shapes of the tensors say which modules are adapted, and at which rank. ``keys``
    only shows whether a module's tensors are missing: mlx-lm writes names inside the last
    ``num_layers`` blocks, which may match nothing, and this package writes whole paths.
    """

    rank: Annotated[int, Field(ge=1)] = 1
    scale: Scale
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keys: list[str] | None = None


class BaseQuantization(pydantic.BaseModel):
    """The quantization of a base that is stored with the adapter."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

    @property
    def names(self) -> list[str]:
        """Names of the base's arrays."""
        if self.mode == "affine":
            return ["weight", "scales", "biases"]
        return ["weight", "scales"]


class BaseFingerprint(pydantic.BaseModel):
    """A digest of the adapted layers' arrays, and the quantization of the first layer."""

    fingerprint: str
    quantization: dict[str, Any] | None = None


class StoredConfig(pydantic.BaseModel):
    """The keys of ``adapter_config.json`` that this package reads."""

    fine_tune_type: AdapterKind = "lora"
    lora_parameters: LoRAParameters
    num_layers: Any = None
    start_rank: Annotated[int, Field(ge=1)] | None = None
    base_quantization: BaseQuantization | None = None
    base: BaseFingerprint | None = None
    vocabulary: str | None = None
    model: str | None = None
    train_modules: list[str] = []
    prompt_format: dict[str, Any] = {}
    made_with: dict[str, Any] | None = None


def adapter_files(path: Path) -> tuple[Path, str]:
    """Return an adapter's folder and the name of its weights file.

    Args:
        path: The folder, or a weights file in it with a name that mlx-lm uses:
            ``adapters.safetensors``, or ``0000100_adapters.safetensors`` for a checkpoint.

    Raises:
        AdapterError: The path is a file with another name.
    """
    if path.is_dir() or path.suffix != ".safetensors":
        if is_gguf(path):
            raise AdapterError(_about_gguf(path))
        if path.is_file():
            is_beside = (path.parent / CONFIG).is_file()
            folder = f", {path.parent}" if is_beside else ""
            raise AdapterError(
                f"{path} is a file other than {WEIGHTS}: give the adapter's folder{folder}"
            )
        return path, WEIGHTS

    is_checkpoint = re.fullmatch(rf"[0-9]+_{re.escape(WEIGHTS)}", path.name)
    if path.name != WEIGHTS and not is_checkpoint:
        raise AdapterError(
            f"{path} is not named like an adapter of mlx-lm, {WEIGHTS} or 0000100_{WEIGHTS}: give"
            " the adapter's folder"
        )
    return path.parent, path.name


def _about_gguf(path: Path) -> str:
    """Return what to do about a GGUF file that was given as an adapter, or that is beside one."""
    if not is_gguf_lora(path):
        return f"{path} is a model, not an adapter: give it as --model {shell_word(path)}"
    return (
        f"{path} is a GGUF file: convert it first, with {import_command(path)}, and give the folder"
        " imported"
    )


def _no_folder(path: Path) -> str:
    """Return the message for the folder of an adapter that does not exist."""
    hint = similar_paths(path, suffixes=())
    if path.name.replace(".", "", 1).isdigit():
        hint = f" (a weight follows its adapter and a colon, as in my_run:{path.name})"
    if ":" in path.name:
        hint = f" (a weight after a colon is a number, as in {path.name.partition(':')[0]}:0.7)"
    if str(path) in MODELS:
        hint = f" (a model without an adapter is given as --model {path})"
    if " " in path.name and not hint:
        hint = " (a prompt follows --prompt)"
    return f"there is no folder {path}{hint}: give the folder of a run or an adapter"


def _no_adapter(config: Path, error: OSError) -> str:
    """Return the message for a folder whose adapter's config can't be read, by what it holds."""
    folder = config.parent
    if files := sorted(folder.glob("*.gguf")):
        return f"{folder} holds no adapter; {_about_gguf(files[0])}"
    if describe_contents(folder).startswith("data"):
        return (
            f"{folder} holds no adapter, but {describe_contents(folder)}: rows go to --data of"
            " mlx_loraplus.train; give the folder of a run or an adapter"
        )

    # A folder with an adapter in it, such as a run's checkpoints
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    hint = f", such as {inside[-1]}" if inside else ""
    return (
        f"{folder} holds no adapter (can't read {config.name}: {error.strerror}): give the folder"
        f" of a run or an adapter{hint}"
    )


def read_adapter_config(path: Path, kind: type[_Config], hint: str = "") -> _Config:
    """Read and validate an adapter's config.

    Args:
        path: The JSON file.
        kind: The pydantic model of the file's contents.
        hint: Text to append to the error message if the file holds something else.

    Raises:
        AdapterError: The file cannot be read, or its contents are not valid for ``kind``.
    """
    try:
        return kind.model_validate(json.loads(read_bounded(path)))
    except OSError as error:
        if not path.parent.is_dir():
            raise AdapterError(_no_folder(path.parent)) from None
        check_not_model(path.parent)
        if path.name == CONFIG and (path.parent / RUN_SETTINGS).is_file():
            raise AdapterError(
                f"the run in {path.parent} has saved no adapter yet: wait for its first checkpoint,"
                f" or if it has ended, mlx_loraplus.train -c {path.parent / RUN_SETTINGS} --resume"
            ) from None
        raise AdapterError(_no_adapter(path, error)) from None
    except pydantic.ValidationError as error:
        problems: list[str] = []
        for detail in error.errors():
            place = ".".join(map(str, detail["loc"]))
            problems.append(f"{place} {detail['msg']}".strip())
        raise AdapterError(
            f"{path} is not an adapter's config: {join_problems(problems)}{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}; {how_to_restore(path)}") from None


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read and check a safetensors file.

    Raises:
        AdapterError: The file does not exist, or its header does not match its contents.
    """
    if not path.is_file():
        raise AdapterError(
            f"{path.parent} holds no adapter: there is no {path.name}; {how_to_restore(path)}"
        )

    # safe_open checks every shape, type and offset in the header against the file; MLX does not.
    try:
        with safe_open(path, "numpy") as opened:
            names = list(opened.keys())
            for name in names:
                _check_type(path, name, opened.get_slice(name).get_dtype())
        weights: Any = mx.load(str(path))
        mx.eval(weights)
    except AdapterError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        details = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"{path} is broken or cut off: {details}; {how_to_restore(path)}"
        ) from None
    return weights


def how_to_restore(path: Path) -> str:
    """Return how to get a file of an adapter again."""
    settings = path.parent / RUN_SETTINGS
    if settings.is_file() and (path.parent / CHECKPOINTS).is_dir():
        command = f"mlx_loraplus.train -c {shell_word(settings)} --resume"
        return f"{command} writes it again, from the last checkpoint"
    return "copy the file again"


def _check_type(path: Path, name: str, dtype: str) -> None:
    """Raise ``AdapterError`` if MLX does not have the dtype that a tensor is stored in."""
    if dtype not in _TYPES:
        raise AdapterError(
            f"{path}: {name[:200]} is stored in the type {dtype}, which MLX can't read; store it in"
            " float32, float16 or bfloat16"
        )


def check_floating(path: Path, name: str, array: mx.array) -> None:
    """Raise ``AdapterError`` if a tensor of an adapter holds integers."""
    if not mx.issubdtype(array.dtype, mx.floating):
        dtype = str(array.dtype).removeprefix("mlx.core.")
        raise AdapterError(
            f"{path}: {name[:200]} holds values of type {dtype}, which are no weights of an"
            " adapter; store it in float32, float16 or bfloat16"
        )


class _NamedModel(pydantic.BaseModel):
    """The keys of ``adapter_config.json`` that name the base: mlx-lm's and ours, or PEFT's."""

    model: str | None = None
    adapter_path: str | None = None
    base_model_name_or_path: str | None = None


def is_adapter(path: str | PathLike[str]) -> bool:
    """Return whether a path leads to an adapter, and not to a model."""
    with suppress(AdapterError, OSError):
        folder, _ = adapter_files(Path(path))
        return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))
    return False


def is_model_folder(path: str | PathLike[str]) -> bool:
    """Return whether a path is a model's folder, such as that of a run with adapter full."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()


def is_model(path: str | PathLike[str]) -> bool:
    """Return whether a path is a model's folder or GGUF file, and not an adapter."""
    file = Path(path)
    return is_model_folder(file) or (is_gguf(file) and not is_gguf_lora(file))


def check_not_model(folder: Path) -> None:
    """Check that a folder that should hold an adapter does not hold a whole model.

    Raises:
        AdapterError: It does.
    """
    if is_model_folder(folder):
        raise AdapterError(f"{folder} is a model, not an adapter: give it as --model {folder}")


def check_not_peft(folder: Path) -> None:
    """Check that an adapter's folder was not written by PEFT, whose adapters must be converted.

    Raises:
        AdapterError: It was; the message says how to convert it.
    """
    stored = _stored_json(folder)
    if "peft_type" in stored:
        raise AdapterError(
            f"{folder} holds an adapter in PEFT's format: convert it first (with --model, if its"
            f" base {stored.get('base_model_name_or_path')} has another name or place here), with"
            f" mlx_loraplus.export --from peft --adapter-path {folder} --save-path imported"
        )


def check_is_adapter(folder: Path) -> None:
    """Check that a folder does not hold a model, an adapter of PEFT, or weights without an adapter.

    Raises:
        AdapterError: It does; the message says what to do.
    """
    check_not_model(folder)
    check_not_peft(folder)
    if _stored_json(folder).get("fine_tune_type") == "full":
        raise AdapterError(
            f"{folder} holds weights that mlx-lm trained (fine_tune_type full), not an adapter:"
            f" convert them to a model with mlx_lm.fuse --model BASE --adapter-path {folder}"
            " --save-path fused, and give --model fused"
        )


def _stored_json(folder: Path) -> dict[str, Any]:
    """Return the contents of an adapter's config; an empty dictionary if it can't be read."""
    stored: Any = None
    with suppress(OSError, ValueError, RecursionError):
        stored = json.loads(read_bounded(folder / CONFIG))
    return stored if isinstance(stored, dict) else {}


def check_names_model(name: str) -> None:
    """Check that a name that should be a model's is not the path of an adapter.

    Raises:
        AdapterError: It is an adapter of PEFT, or an adapter that names no model.
        ConfigError: It is an adapter; the message names its model.
    """
    if is_adapter(name):
        check_not_peft(Path(name))
        raise ConfigError(
            f"--model {name} holds an adapter, not a model: give its model, --model"
            f" {model_for(None, name)} (--resume-adapter-file {name} trains the adapter further, in"
            " mlx_loraplus.train)"
        )


def model_for(model: str | None, adapter_path: str | PathLike[str] | None) -> str:
    """Return the name of the model to load: the given one, or the one that an adapter names.

    Args:
        model: The model that the user gave.
        adapter_path: An adapter's folder or weights file.

    Raises:
        AdapterError: The adapter names no model, or its model is no longer where it was.
    """
    if model is not None:
        return model
    if adapter_path is None:
        return DEFAULT_MODEL

    folder, _ = adapter_files(Path(adapter_path))
    name = recorded_model(folder)
    if name is None:
        raise AdapterError(f"{folder} does not say which model it belongs to: give --model")
    if name not in MODELS and Path(name).is_absolute() and not Path(name).exists():
        raise AdapterError(
            f"{folder} belongs to the model {name}, which is no longer there: give its new place"
            " with --model"
        )
    return name


def recorded_model(folder: Path) -> str | None:
    """Return the model that an adapter's folder names, or None.

    Raises:
        AdapterError: The folder holds no adapter.
    """
    if not folder.is_dir():
        raise AdapterError(_no_folder(folder))
    check_not_model(folder)
    named = read_adapter_config(folder / CONFIG, _NamedModel)

    # mlx-lm stores both paths as they were given.
    name = named.model or named.base_model_name_or_path
    if named.model and named.adapter_path:
        name = present_path(named.model, named.adapter_path, folder)

    # The settings of a run contain its old folder, so its model is found even after a move.
    with suppress(ConfigError):
        in_run: Any = read_run_settings(folder / RUN_SETTINGS).get("model")
        is_name = isinstance(in_run, str) and not in_run.endswith(UNKNOWN_MODEL)
        if is_name and (name is None or Path(in_run).exists()):
            return in_run
    return name
