"""LoRA+: one optimizer whose groups learn at different rates on one schedule.

A learns at the rate eta and B at lambda * eta (Hayou, Ghosh, Yu, *LoRA+*, arXiv 2402.12354). At
step t = 0, 1, …:

    rate_A(t) = eta * f(t),   rate_B(t) = lambda * rate_A(t),
    rate_embedding(t) = eta_embedding * f(t)

The rate of DoRA's magnitudes is a separate multiple of rate_A, 1 by default.

f rises linearly to 1 over the warm-up, then stays (constant) or falls to 0 (linear, cosine). The
rates are passed to the update rule itself. Scaling B's gradients would have no effect with Adam,
and scaling B's finished step causes errors of up to 19% in bfloat16.

Weight decay is decoupled and the same for A and B: both are multiplied by 1 - rate_A(t) *
weight_decay before the step. Lambda therefore makes B learn faster, but not decay faster. Nothing
else decays, neither magnitudes nor embedding adapters nor modules that are trained in full.

With adapter full, the weights learn at rate_A, and their matrices decay. Weights in half precision
are updated with compensation; see ``compensation.py``.

Muon makes the step of a matrix orthogonal. This is not possible for vectors (DoRA's magnitudes,
VeRA, norms), so Adam updates them at the same rates, as Muon's authors do
(https://kellerjordan.github.io/posts/muon).
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..adapters.made_with import trained_with
from ..call_checks import types_checked
from ..config import OptimizerConfig
from ..errors import ConfigError, counted
from ..settings import checked, fill_rates, fit_warmup
from .compensation import HALF_TYPES, narrowed, widened, zero_compensation
from .joined_parameters import JoinedParameters
from .schedule import rate_factor

_COMPENSATION = "compensation"  # key for what rounding to half precision loses
_GROUPS = ("lora_a", "lora_b", "magnitude", "weights", "embedding")
_ELEMENTWISE = {"adamw", "adam", "sgd", "lion"}

# LoRAPlus applies the weight decay itself, so all rules are created without it. By default, MLX's
# Adam has no bias correction, and its first steps would be three to six times too long. By default,
# Adafactor ignores the given rate.
_RULES: dict[str, Callable[[float], optim.Optimizer]] = {
    "adamw": lambda rate: optim.Adam(rate, bias_correction=True),
    "adam": lambda rate: optim.Adam(rate, bias_correction=True),
    "sgd": lambda rate: optim.SGD(rate),
    "lion": lambda rate: optim.Lion(rate),
    "adafactor": lambda rate: optim.Adafactor(rate, relative_step=False, scale_parameter=False),
    "muon": lambda rate: optim.Muon(rate, weight_decay=0.0),
}


class LoRAPlus:
    """Updates A, B and embedding adapters, each at its own rate.

    Args:
        config: Update rule, rates, decay, schedule, clipping. ``init`` fills in the default rates,
            which depend on the adapters.
        total_steps: Number of steps in the run. A falling schedule ends at this step.

    Example:
        >>> optimizer = LoRAPlus(OptimizerConfig(lr_ratio=16), total_steps=100)
        >>> optimizer.init(model, trainable.groups)
        >>> norm = optimizer.update(model, gradients)
    """

    @types_checked
    def __init__(self, config: OptimizerConfig, total_steps: int):
        if total_steps < 1:
            raise ConfigError(f"total_steps is {total_steps}; allowed are 1 or more")
        self._given = config
        self.config = fit_warmup(checked(config), total_steps)
        if self.config.learning_rate == "auto":
            raise ConfigError("learning_rate auto is found by finetune: give LoRAPlus a number")
        assert self.config.learning_rate is not None
        self.total_steps = total_steps
        self.groups: dict[str, str] = {}  # the group of each parameter
        self._rules: dict[str, optim.Optimizer] = {}  # by key: a group, or a group's vectors
        self._members: dict[str, JoinedParameters] = {}  # the parameters of each rule
        self._group_of_rule: dict[str, str] = {}  # the group whose rate each rule uses
        self.state: dict[str, Any] = {
            "step": mx.array(0, mx.uint32),
            "learning_rate": mx.array(self.config.learning_rate, mx.float32),
        }

    @types_checked
    def init(self, model: nn.Module, groups: Mapping[str, str]) -> None:
        """Create the state of every trainable parameter, so that a compiled step can capture it.

        Args:
            model: The model to train.
            groups: Path of each trainable parameter → its group, one of ``_GROUPS``: the ``groups``
                that ``attach_adapters`` returns.

        Raises:
            ConfigError: The groups do not match the trainable parameters, or Muon is used with
                experts (3-D parameters).
        """
        parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        _check_groups(parameters, groups)
        self._fill_default_rates(model)
        if self.config.optimizer == "muon":
            _check_no_experts(parameters)

        # Remove the state of an earlier call.
        for key in self._members:
            del self.state[key]
        self.state.pop(_COMPENSATION, None)

        # With adapter full, weights in half precision have a compensation for lost bits.
        half = {name: array for name, array in parameters.items() if array.dtype in HALF_TYPES}
        if half:
            self.state[_COMPENSATION] = {
                name: zero_compensation(array) for name, array in half.items()
            }
        self.groups = dict(groups)
        self._members, self._group_of_rule, self._rules = {}, {}, {}

        # Each group has one rule. With Muon, the vectors of a group have another rule. With adapter
        # full, vectors (norms and biases) have a rule without decay.
        for group in sorted(set(groups.values())):
            members = {name: array for name, array in parameters.items() if groups[name] == group}
            vectors: dict[str, mx.array] = {}
            rule_of_vectors = "adamw" if self.config.optimizer == "muon" else self.config.optimizer
            if self.config.optimizer == "muon" or group == "weights":
                vectors = {name: array for name, array in members.items() if array.ndim < 2}
            others = {name: array for name, array in members.items() if name not in vectors}
            if others:
                self._add(group, group, others, self.config.optimizer)
            if vectors:
                self._add(f"{group}_vectors", group, vectors, rule_of_vectors)

    def _fill_default_rates(self, model: nn.Module) -> None:
        """Fill in the rates that were not given, as the adapters need them; a run has done so."""
        before: Any = mx.array(self.config.learning_rate or 0.0, mx.float32)
        filled = fill_rates(self._given, trained_with(model))
        rate, ratio = filled.learning_rate, filled.lr_ratio
        self.config = replace(self.config, learning_rate=rate, lr_ratio=ratio)

        # Keep a rate that was set after the optimizer was made.
        if rate is not None and self.learning_rate == before.item():
            self.learning_rate = rate

    def _add(self, key: str, group: str, parameters: Mapping[str, mx.array], rule: str) -> None:
        """Create the state of some parameters of a group, and store it under ``key``."""
        self._group_of_rule[key] = group
        parameters = self._widened(parameters)
        # Joining copies the arrays, and the matrices of adapter full are too large to be copied.
        join = rule in _ELEMENTWISE and key != "weights"
        members = JoinedParameters(parameters, join=join)
        optimizer = _RULES[rule](0.0)  # ``_apply_rule`` sets the rate before each step
        optimizer.init(members.join(parameters))
        self._members[key], self._rules[key] = members, optimizer
        self.state[key] = optimizer.state

    def update(
        self, model: nn.Module, gradients: dict[str, Any], usable: mx.array | None = None
    ) -> mx.array:
        """Clip the gradients and update the model in place.

        If a gradient is not finite, only the step count changes.

        Args:
            model: The model given to ``init``.
            gradients: Tree of the trainable parameters' gradients, from ``nn.value_and_grad``.
            usable: A bool scalar. False, for a loss that is not finite, skips the update too.

        Returns:
            The gradients' global norm before clipping, a scalar.
        """
        if not self._members:
            raise ConfigError(
                "the optimizer knows no parameters yet: call init(model, trainable.groups) first"
            )
        flat: dict[str, mx.array] = dict(tree_flatten(gradients))
        parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        # A and B are float32 and stay as they are; weights in half precision get their lost bits.
        exact = self._widened(parameters)

        # The small arrays of each rule are flattened and joined into a few, because each array
        # costs GPU kernels.
        joined = {key: members.join(flat) for key, members in self._members.items()}

        # Clip by the norm of all gradients together.
        norm = _global_norm(array for arrays in joined.values() for array in arrays.values())
        finite = mx.isfinite(norm) if usable is None else mx.isfinite(norm) & usable
        shrink = mx.array(1.0)
        if self.config.max_grad_norm > 0:
            shrink = mx.minimum(self.config.max_grad_norm / (norm + 1e-6), 1.0)

        # Update each group at its own rate.
        rates = self._rates(self.state["step"])
        for key, members in self._members.items():
            stepped = joined[key]
            if self.config.max_grad_norm > 0:
                stepped = {name: gradient * shrink for name, gradient in stepped.items()}
            after = self._apply_rule(key, stepped, members.join(exact), rates, finite)
            stored = self._narrowed(members.split(after), parameters, finite)
            model.update(tree_unflatten(list(stored.items())))

        self.state["step"] = self.state["step"] + 1
        return norm

    def _apply_rule(
        self,
        key: str,
        gradients: dict[str, mx.array],
        before: dict[str, mx.array],
        rates: Mapping[str, mx.array],
        finite: mx.array,
    ) -> dict[str, mx.array]:
        """Return the parameters of a rule after a step, or unchanged if it is not finite."""
        # Weight decay shrinks A and B, or the matrices of adapter full, before their step.
        decayed = before
        if self.config.weight_decay > 0 and key in ("lora_a", "lora_b", "weights"):
            keep = 1 - rates["lora_a"] * self.config.weight_decay
            decayed = {name: array * keep for name, array in before.items()}

        # Keep the old state in a tree of its own, because the rule replaces its arrays.
        rule = self._rules[key]
        state = tree_map(lambda array: array, rule.state)
        rule.learning_rate = rates[self._group_of_rule[key]]
        after = rule.apply_gradients(gradients, decayed)

        # If a gradient is not finite, keep the rule's state and the parameters.
        rule.state.update(tree_map(lambda new, old: mx.where(finite, new, old), rule.state, state))
        return {name: mx.where(finite, after[name], before[name]) for name in before}

    def _widened(self, parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the exact values of parameters, in float32 if they are in half precision."""
        lost = self.state.get(_COMPENSATION, {})
        return {name: widened(array, lost.get(name)) for name, array in parameters.items()}

    def _narrowed(
        self,
        exact: Mapping[str, mx.array],
        before: Mapping[str, mx.array],
        finite: mx.array,
    ) -> dict[str, mx.array]:
        """Return the new parameters in their own types, and keep what rounding loses.

        Args:
            exact: The new exact values. For a skipped step, those before it.
            before: The parameters before the step.
            finite: Whether the step counts. If not, nothing changes.
        """
        lost = self.state.get(_COMPENSATION, {})
        stored = dict(exact)
        for name in sorted(exact.keys() & lost.keys()):
            weight, rest = narrowed(exact[name], before[name].dtype)
            stored[name] = mx.where(finite, weight, before[name])
            lost[name] = mx.where(finite, rest, lost[name])
        return stored

    @property
    def learning_rate(self) -> float:
        """The peak rate eta of A. Setting it also changes B's rate, because lambda is kept."""
        return self.state["learning_rate"].item()

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        if not 0 < rate < math.inf:
            raise ConfigError(f"learning_rate must be above 0 and finite, not {rate}")
        self.state["learning_rate"] = mx.array(rate, mx.float32)

    @contextmanager
    def constant_rates(self) -> Generator[None]:
        """Update at the peak rates inside the block, without warm-up and schedule.

        A step that was compiled outside the block keeps its schedule.
        """
        config = self.config
        self.config = replace(config, warmup=0, schedule="constant")
        try:
            yield
        finally:
            self.config = config

    @property
    def rates(self) -> dict[str, float]:
        """Group → the rate of the last update of its parameters; 0 before the first step."""
        return {
            group: self.state[key]["learning_rate"].item()
            for key, group in self._group_of_rule.items()
        }

    def arrays(self) -> dict[str, mx.array]:
        """Return the whole state as flat name → array, ready for a safetensors file.

        Names and shapes are those of the parameters, even if the parameters are joined.
        """
        flat = {name: self.state[name] for name in self._own_names()}
        flat |= {
            f"{_COMPENSATION}.{name}": array
            for name, array in self.state.get(_COMPENSATION, {}).items()
        }
        for key, members in self._members.items():
            arrays = members.split_state(self._rules[key].state)
            flat |= {f"{key}.{name}": array for name, array in arrays.items()}
        return flat

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Restore the result of ``arrays`` in place, so that a step compiled earlier uses it.

        Raises:
            ConfigError: The arrays belong to another optimizer or other parameters.
        """
        mine = {name: (array.shape, array.dtype) for name, array in self.arrays().items()}
        theirs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        names = sorted(mine.keys() | theirs.keys())
        different = [name for name in names if mine.get(name) != theirs.get(name)]
        if different:
            raise ConfigError(
                "the saved optimizer state belongs to another optimizer or other adapters:"
                f" it differs in {counted(len(different), 'array')}, such as"
                f" {different[0]!r:.80}; use the state of this run, or train from the start"
            )

        for name in self._own_names():
            self.state[name] = arrays[name]
        for name in self.state.get(_COMPENSATION, {}):
            self.state[_COMPENSATION][name] = arrays[f"{_COMPENSATION}.{name}"]
        for key, members in self._members.items():
            prefix = f"{key}."
            own = {
                name.removeprefix(prefix): arrays[name]
                for name in arrays
                if name.startswith(prefix)
            }
            members.restore_state(self._rules[key].state, own)

    def _own_names(self) -> list[str]:
        """Return the names of the state that belongs to no parameter."""
        return sorted(self.state.keys() - self._members.keys() - {_COMPENSATION})

    def _rates(self, step: mx.array) -> dict[str, mx.array]:
        """Return group → rate at step ``step``."""
        factor = rate_factor(self.config, step.astype(mx.float32), self.total_steps)
        rate_a = self.state["learning_rate"] * factor
        return {
            "lora_a": rate_a,
            "lora_b": self.config.lr_ratio * rate_a,
            "magnitude": self.config.magnitude_lr_ratio * rate_a,
            "weights": rate_a,
            "embedding": self.config.embedding_learning_rate * factor,
        }


def _check_groups(parameters: Mapping[str, mx.array], groups: Mapping[str, str]) -> None:
    """Check that each parameter that trains has a group with a rate.

    Raises:
        ConfigError: Nothing trains, a parameter has no group, or a group has no parameter or no
            rate.
    """
    if not parameters:
        raise ConfigError("the model has nothing to train: call attach_adapters first")
    if parameters.keys() != groups.keys():
        outside, frozen = parameters.keys() - groups.keys(), groups.keys() - parameters.keys()
        stray = f"{min(outside)} is in no group" if outside else f"{min(frozen)} does not train"
        raise ConfigError(
            f"the groups must be those of what trains, but {stray}: give the groups that"
            " attach_adapters returns (trainable.groups)"
        )
    unknown = sorted(set(groups.values()) - set(_GROUPS))
    if unknown:
        raise ConfigError(
            f"no rate is known for the groups {unknown}: there are {', '.join(_GROUPS)}"
        )


def _check_no_experts(parameters: Mapping[str, mx.array]) -> None:
    """Check that Muon can step all parameters.

    Raises:
        ConfigError: A parameter has more than two dimensions.
    """
    deep = [name for name, array in parameters.items() if array.ndim > 2]
    if deep:
        raise ConfigError(
            f"muon can't step experts ({deep[0]} has {parameters[deep[0]].ndim} dimensions):"
            " use adamw"
        )


def _global_norm(arrays: Iterable[mx.array]) -> mx.array:
    """Return the Euclidean norm of all arrays together, in float32."""
    squares = [mx.square(array.astype(mx.float32)).sum() for array in arrays]
    return mx.sqrt(sum(squares, mx.array(0.0)))
