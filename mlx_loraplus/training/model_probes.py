"""Tests of a model on a few tokens, which decide how a run trains the model.

The memory-saving kernels are used only where they give the same results as the model. Each verdict
affects the last bits of every step, and a borderline verdict may change while the adapters are
trained. A run therefore stores its verdicts, and a resumed run reuses them instead of testing
again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import mlx.nn as nn
import pydantic

from ..kernels.elementwise import GATES
from ..kernels.patch import find_gated_mlps
from ..kernels.row_masks import takes_caches
from ..kernels.trunk_and_head import TrunkAndHead, find_trunk_and_head, head_candidates
from .distributed import World


@dataclass(frozen=True)
class HeadLocation:
    """Where a model's output head is, and how the logits follow from its scores.

    Attributes:
        candidate: The number of this trunk and head among ``head_candidates``.
        layer: The path of the head's module, or None if it is not part of the model's modules.
        multiplier: The factor of the scores.
        cap: The soft cap of the logits, or None.
    """

    candidate: int
    layer: str | None
    multiplier: float
    cap: float | None


@dataclass(frozen=True)
class ModelProbes:
    """The verdicts about one model.

    Attributes:
        gated_mlps: path → gate of every MLP that the memory-saving kernel computes.
        head: Where the output head is, or None if full logits have to be computed.
        takes_caches: Whether the model follows masks that are passed as caches, as packing needs.
        checkpoint_sound: Whether checkpointed blocks give the right gradients; None if not tested.
    """

    gated_mlps: dict[str, str]
    head: HeadLocation | None
    takes_caches: bool
    checkpoint_sound: bool | None = None

    def trunk_and_head(self, model: nn.Module) -> TrunkAndHead | None:
        """Return the model's trunk and head, or None if full logits have to be computed."""
        if self.head is None:
            return None

        candidates = list(head_candidates(model))
        trunk_and_head = candidates[self.head.candidate]
        return replace(
            trunk_and_head, takes_caches=self.takes_caches, candidate=self.head.candidate
        )

    def match(self, model: nn.Module) -> bool:
        """Return whether the model has the modules and the head that the verdicts name."""
        paths = {path for path, _ in model.named_modules()}
        gates = set(self.gated_mlps.values())
        if not (self.gated_mlps.keys() <= paths and gates <= GATES.keys()):
            return False
        if self.head is None:
            return True

        # The candidate of this number must still have the same head.
        candidates = list(head_candidates(model))
        if not 0 <= self.head.candidate < len(candidates):
            return False
        trunk_and_head = replace(candidates[self.head.candidate], candidate=self.head.candidate)
        return locate_head(model, trunk_and_head) == self.head


def probe_model(model: nn.Module, *, pack: bool) -> ModelProbes:
    """Test the kernels, and find the trunk and head, on a model.

    Args:
        model: The model with its adapters.
        pack: Whether examples are packed. Then caches are tested even if they are not found.
    """
    trunk_and_head = find_trunk_and_head(model)
    if trunk_and_head is None:
        return ModelProbes(find_gated_mlps(model), None, pack and takes_caches(model))

    return ModelProbes(
        find_gated_mlps(model), locate_head(model, trunk_and_head), trunk_and_head.takes_caches
    )


def locate_head(model: nn.Module, trunk_and_head: TrunkAndHead) -> HeadLocation:
    """Return where a model's head is, in a form that can be stored."""
    path_of = {id(module): path for path, module in model.named_modules()}
    head = trunk_and_head.head
    return HeadLocation(
        trunk_and_head.candidate, path_of.get(id(head.layer)), head.multiplier, head.cap
    )


def reusable_probes(
    stored: ModelProbes | None,
    model: nn.Module,
    *,
    then: Mapping[str, str],
    now: Mapping[str, str],
) -> ModelProbes | None:
    """Return the stored verdicts if they still hold, or None if the model must be tested again.

    Args:
        stored: The verdicts in a checkpoint; version 0.1.0 stored none.
        model: The model with its adapters.
        then: The versions of the libraries when the verdicts were stored.
        now: The versions of the libraries now. Another version may compute different results.
    """
    if stored is None or then != now:
        return None

    # The checkpoint may come from an untrusted source and name any module.
    return stored if stored.match(model) else None


def share_probes(probes: ModelProbes, world: World) -> ModelProbes:
    """Return the main process's verdicts on all processes."""
    # Every process gets the verdicts of all; those of the main process come first.
    shared = world.gather(json.dumps(asdict(probes)))[0]
    return pydantic.TypeAdapter(ModelProbes).validate_python(json.loads(shared))
