"""Compare the activation that a config names with the one that mlx-lm's layers compute.

Most of mlx-lm's families have a fixed activation and ignore the one in the config. A model that was
trained with another activation loads without an error, but its outputs are wrong.
"""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..errors import ModelError
from .rope_parameters import text_part

_FIELDS = ("hidden_activation", "mlp_hidden_act", "hidden_act", "activation_function")
"""The fields of a config that may name the activation; the first one that is set is used."""

_FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": nn.relu2,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "hardswish": nn.hardswish,
    "mish": nn.mish,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
    "linear": lambda x: x,
}
"""Name → function, as in ``ACT2FN`` of transformers' ``activations.py``."""

_SAME = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
}
"""Another name in ``ACT2FN`` → the name of the same function in ``_FUNCTIONS``."""

_GELUS = {"gelu", "gelu_pytorch_tanh"}

_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w2", "w1", "c_proj"),
    ("c_fc_0", "c_fc_1", "c_proj"),
    ("mlp_gate", "mlp_linear", "mlp_resid"),
)
"""Names of the layers gate, up and down in down(f(gate(x)) * up(x))."""

_FUSED = (
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
    ("proj_1", "proj_2"),
)
"""Names of the layers if gate and up are the halves of one matrix: (gate and up, down)."""

_PLAIN = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""Names of the layers first and second in second(f(first(x)))."""

_CLOSE = 2e-5  # GELU and its tanh approximation differ by 5e-4


def check_activation(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that a model's MLPs compute the activation that its config names.

    GELU and its tanh approximation count as equal here; ``activation_note`` reports a difference.

    Raises:
        ModelError: The MLPs compute another activation.
    """
    named, computed = _named(config), _computed(model)
    if named not in _FUNCTIONS or computed is None or named == computed:
        return
    if {named, computed} <= _GELUS:
        return
    raise ModelError(
        f"its config.json has the activation {named}, but mlx-lm's {config['model_type']} always"
        f" computes {computed}, so its outputs would be wrong; use a newer mlx-lm, or another"
        " model"
    )


def activation_note(model: nn.Module, config: dict[str, Any]) -> str | None:
    """Return a note on an activation whose name is unknown, or on another version of GELU, or None.

    A name is only reported if mlx-lm computes a known activation: some families have a name and a
    function of their own.
    """
    named, computed = _named(config), _computed(model)
    if named is not None and named not in _FUNCTIONS and computed is not None:
        return (
            f"config.json has the activation {named!r:.40}, a name that is not known here, and"
            f" mlx-lm computes {computed}; if that is another function, the outputs are wrong"
        )
    if named == computed or not {named, computed} <= _GELUS:
        return None
    return (
        f"config.json has the activation {named}, and mlx-lm computes {computed}; the two differ by"
        " less than 0.0005"
    )


def _named(config: dict[str, Any]) -> str | None:
    """Return the activation that a config names, or None; it may not be in ``_FUNCTIONS``."""
    text = text_part(config)
    named = [text[field] for field in _FIELDS if text.get(field) is not None]
    if not named or not isinstance(named[0], str):
        return None
    name = _SAME.get(named[0], named[0])

    # In Gemma's configs "gelu" means the tanh approximation; transformers reads it the same way.
    if name == "gelu" and str(text.get("model_type")).startswith("gemma"):
        name = "gelu_pytorch_tanh"
    return name


def _computed(model: nn.Module) -> str | None:
    """Return the activation that a model's MLPs compute, or None if it can't be recognized."""
    # Between -6.5 and 6.5 all functions differ, and no family clips its values.
    inputs = mx.linspace(-6.5, 6.5, 27)

    # Check one MLP of each class.
    probed: set[type] = set()
    for module in model.modules():
        if type(module) in probed:
            continue
        values = _probe(module, inputs)
        if values is None:
            continue

        probed.add(type(module))
        for name, function in _FUNCTIONS.items():
            if mx.allclose(values, function(inputs), rtol=0, atol=_CLOSE).item():
                return name
    return None


def _probe(mlp: nn.Module, inputs: mx.array) -> mx.array | None:
    """Return the values of a module's activation, or None if the module is not an MLP."""
    try:
        if isinstance(mlp, SwitchGLU):
            values: Any = mlp.activation(mx.ones_like(inputs), inputs)
        elif isinstance(mlp, SwitchMLP):
            values = mlp.activation(inputs)
        else:
            stubbed = _with_stubs(mlp)
            values = None if stubbed is None else stubbed(inputs)
    # The module has layers with the names of an MLP's layers, but is not an MLP.
    except Exception:  # noqa: BLE001
        return None
    is_whole = isinstance(values, mx.array) and values.shape == inputs.shape
    return values if is_whole else None


def _with_stubs(mlp: nn.Module) -> Any:
    """Return a copy of an MLP that computes only its activation; None for other modules.

    In the copy, the gate and the last matrix return their input, and the other matrix returns ones.
    """

    def same(x: mx.array) -> mx.array:
        return x

    def halves(x: mx.array) -> mx.array:
        return mx.concatenate([x, mx.ones_like(x)], axis=-1)

    # A gated MLP also has the layer names of a plain MLP, so it must be checked first.
    kinds = (
        (_GATED, (same, mx.ones_like, same)),
        (_FUSED, (halves, same)),
        (_PLAIN, (same, same)),
    )
    stubs: dict[str, Callable[[mx.array], mx.array]] = {}
    for table, functions in kinds:
        names = _matching_names(mlp, table)
        if names:
            stubs = dict(zip(names, functions, strict=True))
            break
    else:
        return None

    # Make norms and dropout between the layers return their input.
    stubbed: Any = copy.copy(mlp)
    for name, child in mlp.items():
        is_between = isinstance(child, nn.RMSNorm | nn.LayerNorm | nn.Dropout)
        if name in stubs or is_between:
            setattr(stubbed, name, stubs.get(name, same))
    return stubbed


def _matching_names(mlp: nn.Module, table: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """Return the first row of a table in which every name is a layer of the module, or None."""
    for names in table:
        if set(names) <= set(mlp):
            return names
    return None
