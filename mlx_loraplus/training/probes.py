"""What a run finds out about its model by trying it on a few tokens.

The memory-saving kernels are used only where they compute the same as the model. Each verdict
changes the last bits of every step, and a close one may change while the adapters are trained. A
run therefore stores its verdicts, and a resumed run reuses them instead of trying again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import mlx.nn as nn
import pydantic

from ..kernels.elementwise import GATES
from ..kernels.head import Head, TrunkAndHead, split_model
from ..kernels.packed_rows import takes_caches
from ..kernels.patch import find_gated_mlps
from .distributed import World


@dataclass(frozen=True)
class HeadLocation:
    """Where a model's trunk and head are, and how the logits follow from the head's scores.

    Attributes:
        trunk: The path of the trunk's module.
        layer: The path of the head's module.
        multiplier: The factor of the scores.
        cap: The soft cap of the logits, or None.
    """

    trunk: str
    layer: str
    multiplier: float
    cap: float | None


@dataclass(frozen=True)
class ModelProbes:
    """What was found out about one model.

    Attributes:
        gated_mlps: path → gate of every MLP that the memory-saving kernel computes.
        head: Where the output head is, or None if full logits have to be computed.
        takes_caches: Whether the model follows masks that are passed as caches, as packing needs.
        checkpoint_sound: Whether checkpointed blocks give the right gradients; None if not tried.
    """

    gated_mlps: dict[str, str]
    head: HeadLocation | None
    takes_caches: bool
    checkpoint_sound: bool | None = None

    def split(self, model: nn.Module) -> TrunkAndHead | None:
        """Return the model's trunk and head, or None if full logits have to be computed."""
        if self.head is None:
            return None

        modules = dict(model.named_modules())
        head = Head(modules[self.head.layer], self.head.multiplier, self.head.cap)
        return TrunkAndHead(modules[self.head.trunk], head, self.takes_caches)

    def match(self, model: nn.Module) -> bool:
        """Return whether all modules and gates that the verdicts name exist."""
        named = set(self.gated_mlps)
        if self.head is not None:
            named |= {self.head.trunk, self.head.layer}
        existing = {path for path, _ in model.named_modules()}
        return named <= existing and GATES.keys() >= set(self.gated_mlps.values())


def probe_model(model: nn.Module, *, pack: bool) -> ModelProbes:
    """Try the kernels and the split into trunk and head on a model.

    Args:
        model: The model with its adapters.
        pack: Whether examples are packed, so that the model has to take caches in any case.
    """
    split = split_model(model)
    if split is None:
        return ModelProbes(find_gated_mlps(model), None, pack and takes_caches(model))

    # The verdicts name modules by their paths, so that they can be stored.
    path_of = {id(module): path for path, module in model.named_modules()}
    head = HeadLocation(
        trunk=path_of[id(split.trunk)],
        layer=path_of[id(split.head.layer)],
        multiplier=split.head.multiplier,
        cap=split.head.cap,
    )
    return ModelProbes(find_gated_mlps(model), head, split.takes_caches)


def reusable_probes(
    stored: ModelProbes | None,
    model: nn.Module,
    *,
    then: Mapping[str, str],
    now: Mapping[str, str],
) -> ModelProbes | None:
    """Return the stored verdicts if they still hold, or None if the model has to be tried again.

    Args:
        stored: The verdicts in a checkpoint; version 0.1.0 stored none.
        model: The model with its adapters.
        then: The versions of the libraries when the verdicts were stored.
        now: The versions of the libraries now. Another version may compute something else.
    """
    if stored is None or then != now:
        return None

    # The checkpoint may come from a stranger and name anything.
    return stored if stored.match(model) else None


def share_probes(probes: ModelProbes, world: World) -> ModelProbes:
    """Return the main process's verdicts on all processes."""
    # Every process gets all verdicts; the main process's come first.
    shared = world.gather(json.dumps(asdict(probes)))[0]
    return pydantic.TypeAdapter(ModelProbes).validate_python(json.loads(shared))
