"""Public functions refuse values of wrong types, in one line that names the argument."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from scripts.tiny_model import write_tiny_model

NO_MODEL: list[Any] = [None, "tiny", 5, ["a model"], (nn.Linear(2, 2), "tokenizer")]
NO_TOKENIZER: list[Any] = [None, "tiny", nn.Linear(2, 2)]
NO_PATH: list[Any] = [5, ["a"], nn.Linear(2, 2)]

WRONG: dict[str, dict[str, list[Any]]] = {
    "attach_adapters": {"model": NO_MODEL, "config": [None, {"rank": 8}, "lora"], "original": [None]},
    "compare_runs": {"runs": [None, 5, ["a", "b"]]},
    "complete": {
        "model": NO_MODEL, "tokenizer": NO_TOKENIZER, "prompt": [None, 5, ["a"], {"role": "user"}],
        "max_tokens": ["12", None, 1.5, True], "temperature": ["hot", None], "chat": ["yes", None], "system": [5],
    },
    "evaluate": {
        "model": NO_MODEL, "tokenizer": NO_TOKENIZER, "split": ["eval", None, ["test"]], "answers": ["all", None],
        "base": [0.5, "base"],
    },
    "finetune": {"model": NO_MODEL, "tokenizer": NO_TOKENIZER, "log": ["print", True], "callback": ["print"]},
    "fuse_adapter": {
        "model": [*NO_MODEL, Path("my_run")], "bits": ["4", None, 4.5], "dequantize": [None, "yes"],
        "inputs": [[], 5], "dtypes": ["float16"], "track": [None],
    },
    "load": {"name": NO_PATH, "adapter_path": NO_PATH, "group": [2]},
    "load_adapter": {"model": NO_MODEL, "adapter_path": [None, *NO_PATH]},
    "plan_memory": {"model": NO_PATH, "memory": [16, 16.0], "families": [None, 5]},
    "preview": {"tokenizer": NO_TOKENIZER[1:]},
    "save_adapter": {"model": NO_MODEL, "adapter_path": [None, *NO_PATH], "overwrite": [None, "yes"]},
    "find_rate": {"model": NO_MODEL, "tokenizer": NO_TOKENIZER},
    "sweep_rates": {"model": NO_MODEL, "tokenizer": NO_TOKENIZER, "log": ["print", None]},
}  # fmt: skip
UNCHECKED = {"data"}  # a setting, which has checks and messages of its own

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(ml, name) for name in ml.__all__ if not isinstance(getattr(ml, name), type)
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return right values for the arguments that have no default."""
    folder = tmp_path_factory.mktemp("right")
    model, tokenizer = ml.load(write_tiny_model(folder / "tiny"))
    values = {"model": model, "tokenizer": tokenizer, "prompt": "hi", "config": ml.AdapterConfig()}
    return values | {"adapter_path": str(folder / "new"), "name": str(folder / "tiny")}


def test_the_table_covers_every_argument_of_every_public_function():
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters.values()
        checked = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
        assert set(WRONG[name]) == checked - UNCHECKED, name
    assert WRONG.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, names in WRONG.items() for name in names]
)
def test_a_wrong_type_is_one_line(right: dict[str, Any], function: str, name: str):  # fmt: skip
    parameters = inspect.signature(FUNCTIONS[function]).parameters
    for value in WRONG[function][name]:
        given = {
            each: right[each]
            for each, parameter in parameters.items()
            if parameter.default is parameter.empty and each in right
        }
        given[name] = value

        # Some arguments have no name for callers.
        positional = [
            given.pop(each)
            for each, parameter in parameters.items()
            if each in given and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
        ]  # fmt: skip
        with pytest.raises(ml.LoRAPlusError) as error:
            FUNCTIONS[function](*positional, **given)
        said = str(error.value)
        assert function in said, said
        assert name in said, said
        assert "\n" not in said
        assert len(said) < 250


def test_what_the_messages_say(right: dict[str, Any]):
    model, tokenizer = right["model"], right["tokenizer"]
    with pytest.raises(ml.ConfigError, match=r"complete: prompt must be a string, not None"):
        ml.complete(model, tokenizer, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ml.ConfigError, match=r"takes runs one after the other, not in a list: write \*"
    ):
        ml.compare_runs(["a", "b"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match="max_tokens must be a whole number, not '12'"):
        ml.complete(model, tokenizer, "hi", max_tokens="12")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match="bits must be a whole number or 'auto', not '4'"):
        ml.fuse_adapter(model, bits="4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ModelError, match=r"model is a Path|model is a PosixPath, not a model"):
        ml.fuse_adapter(Path("my_run"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["finetune", "evaluate", "sweep_rates", "preview", "plan_memory"])
def test_settings_without_names_are_refused(right: dict[str, Any], name: str):
    values = [right["model"], right["tokenizer"], "my_folder"]
    with pytest.raises(ml.ConfigError, match=r"everything else by name, such as data=…, not"):
        FUNCTIONS[name](*values)


def test_the_arguments_of_classes_are_checked():
    config = ml.OptimizerConfig()
    with pytest.raises(ml.ConfigError, match="LoRAPlus: config must be an OptimizerConfig"):
        ml.LoRAPlus({"lr_ratio": 16}, 10)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match="LoRAPlus: total_steps must be a whole number"):
        ml.LoRAPlus(config, "10")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match=r"Run\.load: folder must be"):
        ml.Run.load(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ConfigError, match=r"Run\.load\(folder\) reads a folder"):
        ml.Run("my_run")  # pyright: ignore[reportArgumentType]


def test_numbers_of_numpy_and_paths_are_accepted(right: dict[str, Any]):
    model, tokenizer = right["model"], right["tokenizer"]
    count: Any = np.int64(2)
    assert isinstance(ml.complete(model, tokenizer, "1", max_tokens=count, temperature=0), str)
    assert ml.load(Path(right["name"]))[0] is not None


def test_missing_and_unknown_arguments(right: dict[str, Any]):
    with pytest.raises(
        ml.ConfigError, match=r"complete needs tokenizer and prompt too; model, tok"
    ):
        ml.complete(right["model"])  # pyright: ignore[reportCallIssue]
    with pytest.raises(ml.ConfigError, match=r"takes no max_token .did you mean 'max_tokens'"):
        ml.complete(right["model"], right["tokenizer"], "hi", max_token=3)  # pyright: ignore[reportCallIssue]


def test_the_tuple_that_load_returns_holds_a_model_of_mlx():
    """Models of other programs, such as torch's, are of a class Module too."""
    complete: Any = ml.complete
    with pytest.raises(ml.ModelError, match=r"write \* before it"):
        complete((nn.Linear(2, 2), "tokenizer"), "hi")
    theirs = type("Module", (), {"__module__": "torch.nn.modules.module"})()
    with pytest.raises(ml.ModelError, match="model is a tuple, not a model: model, tokenizer ="):
        complete((theirs, "tokenizer"), "hi")
