"""Check the arguments of a public function, so that a wrong type is reported as one clear error.

Settings, which are given as ``**settings``, are checked when they become a config.
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import (
    ConfigError,
    DataError,
    LoRAPlusError,
    ModelError,
    counted,
    join_problems,
    nearest,
)
from .foreign_names import find_foreign, meant_setting

Given = ParamSpec("Given")
Result = TypeVar("Result")
Made = TypeVar("Made")

# Types → the words for them in messages
_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    NoneType: "None",
    "PathLike": "a path",
    "Module": "a model",
    "TokenizerWrapper": "the tokenizer that load returns",
    "AdapterConfig": "an AdapterConfig",
    "OptimizerConfig": "an OptimizerConfig",
    "TrainConfig": "a TrainConfig",
    "Callable": "a function",
    "Mapping": "a dict",
    "Evaluation": "the result of evaluate",
    "Group": "the result of mx.distributed.init",
}

DATA_ALLOWED = (
    "give a path or a hub id, an iterable of rows such as {'prompt': …, 'completion': …}, a"
    " datasets.Dataset, a data frame, or a dict of splits such as {'train': rows, 'valid': rows}"
)
MODEL_ALLOWED = "give the name of a model, a hub id, a folder or a .gguf file"

_LOAD = "model, tokenizer = mlx_loraplus.load({name}) loads both"


def types_checked(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return a function that checks the types of its arguments first; see ``check_call``."""

    @functools.wraps(function)
    def checking(*arguments: Given.args, **keywords: Given.kwargs) -> Result:
        check_call(function, arguments, keywords)
        return function(*arguments, **keywords)

    return checking


def check_call(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Check the arguments of a call against the types of the function's parameters.

    Python itself reports superfluous arguments, except settings that are given by position and
    unknown names.

    Raises:
        ConfigError: An argument has a wrong type, or is missing.
        DataError: The data is None.
        ModelError: A model has a wrong type, or its name is None.
    """
    signature = inspect.signature(function)
    _check_positions(_name_of(function), signature, arguments, keywords)
    try:
        given = signature.bind_partial(*arguments, **keywords).arguments
    except TypeError:
        _check_names(_name_of(function), signature, arguments, keywords)
        return

    called, hints = _name_of(function), get_type_hints(function)
    _check_not_none(called, signature, given, hints)
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if name not in hints or name == "data" or kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if kind is not inspect.Parameter.VAR_POSITIONAL:
            _check(called, name, value, hints[name])
            continue

        # Values that are given one after the other, such as the runs of compare_runs.
        for each in value:
            if isinstance(each, list | tuple):
                raise ConfigError(
                    f"{called} takes {name} one after the other, not in a"
                    f" {type(each).__name__}: write * before it"
                )
            _check(called, name, each, hints[name])
    _check_complete(called, signature, given)


def _check_complete(called: str, signature: inspect.Signature, given: dict[str, Any]) -> None:
    """Check that no argument is missing.

    Raises:
        ConfigError: One is.
    """
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        name
        for name, each in signature.parameters.items()
        if each.default is each.empty and each.kind not in several and name not in given
    ]
    if missing:
        hint = ""
        if not {"model", "tokenizer"}.isdisjoint(missing):
            hint = f"; {_LOAD.format(name='name')}"
        raise ConfigError(f"{called} needs {' and '.join(missing)} too{hint}")


def _check_positions(
    called: str,
    signature: inspect.Signature,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    """Check that no argument is given by name that is taken by position only.

    Raises:
        ConfigError: One is, as in ``finetune(model=model)``.
    """
    only = [
        each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_ONLY
    ]
    if any(name in keywords for name in only[len(arguments) :]):
        raise ConfigError(
            f"{called} takes {' and '.join(only)} by position: {called}({', '.join(only)}, …)"
        )


def _check_not_none(
    called: str, signature: inspect.Signature, given: dict[str, Any], hints: dict[str, Any]
) -> None:
    """Check that neither data nor the name of a model is None, which would mean the default.

    Raises:
        DataError: The data is None.
        ModelError: The name of a model is None.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values |= value
        elif _fits(None, hints.get(name, Any)):  # other types are refused with their own messages
            values[name] = value

    if "data" in values and values["data"] is None:
        raise DataError(f"{called}: data is None; {DATA_ALLOWED}; or leave it out")
    if "model" in values and values["model"] is None:
        raise ModelError(f"{called}: model is None; {MODEL_ALLOWED}, or leave it out")


def names_checked(kind: type[Made]) -> type[Made]:
    """Let a dataclass of settings name the keyword that is probably meant by an unknown one."""
    make: Any = kind.__init__
    fields: Any = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    names = [field.name for field in fields]
    parts = [field for field in fields if dataclasses.is_dataclass(field.default_factory)]

    @functools.wraps(make)
    def make_checked(self: Made, *arguments: Any, **settings: Any) -> None:
        unknown = [name for name in settings if name not in names]
        if unknown:
            problems = [f"takes no {name}{_hint(name, names, parts)}" for name in unknown]
            raise ConfigError(f"{kind.__name__} {join_problems(problems)}")
        make(self, *arguments, **settings)

    setattr(kind, "__init__", make_checked)  # noqa: B010  a type checker keeps the real one
    return kind


def _hint(name: str, names: list[str], parts: list[Any]) -> str:
    """Return what is probably meant by a keyword that a dataclass of settings does not have.

    Args:
        name: The keyword.
        names: The fields of the dataclass.
        parts: Those of them that are dataclasses of settings themselves.
    """
    # A setting of another program, or another word
    foreign = find_foreign(name)
    meant = (foreign.ours if foreign else None) or meant_setting(name, names) or name
    if meant in names:
        return f" (did you mean {meant!r}?)"

    # A setting of a part
    for part in parts:
        owner = part.default_factory
        if meant in {field.name for field in dataclasses.fields(owner)}:
            return f" (did you mean {part.name}={owner.__name__}({meant}=…)?)"
    return nearest(name, names) or f"; it takes {', '.join(names)}"


def _name_of(function: Callable[..., Any]) -> str:
    """Return a function's name; for ``__init__``, the name of the class."""
    return function.__qualname__.removesuffix(".__init__")


def _check_names(
    name: str, signature: inspect.Signature, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Check that settings are given by name, and that all names are known.

    Raises:
        ConfigError: Settings are given by position, or a name is unknown.
    """
    parameters = signature.parameters.values()
    positional = [
        each.name
        for each in parameters
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    takes_settings = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if takes_settings and len(arguments) > len(positional):
        extra = arguments[len(positional)]
        raise ConfigError(
            f"{name} takes {' and '.join(positional)}, and everything else by name, such as"
            f" data=…, not {shown(extra)}"
        )

    unknown = [key for key in keywords if key not in signature.parameters]
    if unknown and not takes_settings:
        names = [each for each in signature.parameters if each != "self"]
        hint = nearest(unknown[0], names)
        raise ConfigError(f"{name} takes no {unknown[0]}{hint}; it takes {', '.join(names)}")


def _check(function: str, name: str, value: Any, hint: Any) -> None:
    """Check one argument.

    Raises:
        ConfigError: It has a wrong type.
        ModelError: It should be a model, but is not.
    """
    if _fits(value, hint):
        _check_takes(function, name, value, hint)
        return
    if getattr(hint, "__name__", "") == "Module":
        raise _no_model(function, name, value)

    allowed = " or ".join(dict.fromkeys(_described(hint)))
    message = f"{function}: {name} must be {allowed}, not {shown(value)}"
    if "TokenizerWrapper" in str(hint):
        message += f"; {_LOAD.format(name='name')}"
    raise ConfigError(message)


def _check_takes(function: str, name: str, value: Any, hint: Any) -> None:
    """Check that a function takes as many values as it will be called with.

    Raises:
        ConfigError: It does not.
    """
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for part in parts:
        if get_origin(part) is not Callable or not callable(value):
            continue
        takes: Any = get_args(part)[0]
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # a function written in C may have none
            continue

        try:
            signature.bind(*takes)
        except TypeError:
            kinds = ", ".join(kind.__name__ for kind in takes)
            raise ConfigError(
                f"{function}: {name} is called with {counted(len(takes), 'value')} ({kinds}), but"
                f" the function takes {signature}"
            ) from None


def _no_model(function: str, name: str, value: Any) -> LoRAPlusError:
    """Return the error for a value that should be a model."""
    given, model = shown(value), "name"
    if isinstance(value, tuple) and any(map(is_mlx_module, value)):
        return ModelError(
            f"{function}: {name} is the tuple that load returns: write * before it, as in"
            f" {function}(*loaded), or take it apart first: model, tokenizer = loaded"
        )
    if isinstance(value, str):
        given, model = f"the name {value!r:.80}", f"{value!r:.80}"
    return ModelError(
        f"{function}: {name} is {given}, not a model: {_LOAD.format(name=model)}, and functions"
        " take them in this order"
    )


def is_mlx_module(value: Any) -> bool:
    """Return whether a value is a model of MLX, without importing MLX."""
    return any(
        kind.__name__ == "Module" and kind.__module__.startswith("mlx.")
        for kind in type(value).__mro__
    )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a type; the items of a container are not checked."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return isinstance(value, str | int) and value in get_args(hint)

    # Numbers of numpy count as numbers; True and False do not.
    if hint is int or hint is float:
        kind = numbers.Integral if hint is int else numbers.Real
        return type(value) is not bool and isinstance(value, kind)
    return isinstance(value, origin or hint)


def _described(hint: Any) -> list[str]:
    """Return the words for a type and, for a union, for each of its parts."""
    if get_origin(hint) in (Union, UnionType):
        return [word for part in get_args(hint) for word in _described(part)]
    if get_origin(hint) is Literal:
        return [repr(value) for value in get_args(hint)]

    kind = get_origin(hint) or hint
    name = "PathLike" if hasattr(kind, "__fspath__") else kind.__name__
    return [_WORDS.get(kind) or _WORDS.get(name) or f"a {name}"]


def shown(value: Any) -> str:
    """Return a simple value as it is written in Python, or the type of any other value."""
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.60}"
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeio" else f"a {name}"
