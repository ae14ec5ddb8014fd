"""Other ways to find a learning rate than the package's range test, for ``rate.py``.

Each method trains a fresh adapter for a number of steps' work, and returns a critical rate. Losses
are compared with those of the untrained model on the same batches, because two batches differ more
than two rates do.

Sources: Prodigy, Mishchenko and Defazio, 2306.06101; successive halving, Jamieson and Talwalkar,
1502.07943; the edge of stability, Cohen et al., 2103.00065.
"""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_loraplus.training.range_test import (
    RANGE_TEST,
    SPAN,
    Finding,
    RateMethod,
    TriedRate,
    lowest_rate,
)
from mlx_loraplus.training.rate_probe import FORWARD, Probe

_FIRST_STEPS = 4  # tiny steps that show the optimizer's direction
_TINY = 1e-2  # their rate, divided by the default
_LINE_RATES = 13
_TRIAL_RATES = 5
_TRIAL_SPAN = 30.0
_KEPT_TRIALS = 2


def line_search(probe: Probe, steps: float, default: float) -> Finding:
    """Go along the direction of the optimizer's first steps, and return the best step length.

    The length is given as the rate at which the first steps would have gone as far.
    """
    direction = _first_direction(probe, default)
    batches = max(1, int((steps - probe.spent) / FORWARD / (_LINE_RATES + 1)))

    # The direction comes from the first batches, so judge it on the next ones.
    probe.restart(next_step=_FIRST_STEPS)
    untrained = probe.losses(batches)
    tried: list[TriedRate] = []
    for rate in np.geomspace(default / SPAN, default * SPAN, _LINE_RATES):
        probe.move(direction, float(rate))
        change = float(np.mean(probe.losses(batches) - untrained))
        tried.append(TriedRate(float(rate), change))

    rates = [each.rate for each in tried]
    changes = np.array([each.change for each in tried])
    return Finding(lowest_rate(rates, changes), tuple(tried))


def curvature(probe: Probe, steps: float, default: float) -> Finding:
    """Return the rate at which the loss would be lowest along the optimizer's first direction u.

    With the gradient g and the Hessian H, it is -<g, u> / <u, H u>, half of the rate at the edge
    of stability. H u is estimated from the gradients at two points of the line, the start and the
    point that the default rate reaches. At nearer points, A and B help each other, which bends the
    loss downwards.
    """
    direction = _first_direction(probe, default)
    batches = max(1, int((steps - probe.spent) / 2))

    # Measure the losses and the slopes at both points, on the same batches.
    losses: list[list[float]] = []
    slopes: list[list[float]] = []
    for distance in (0.0, default):
        probe.restart(next_step=_FIRST_STEPS)
        probe.move(direction, distance)
        found = [probe.gradients() for _ in range(batches)]
        losses.append([loss for loss, _ in found])
        slopes.append([_dot(gradients, direction) for _, gradients in found])

    # Compute the curvature along the line, which must be positive for a minimum to exist.
    slope, moved = np.mean(slopes, axis=1).tolist()
    change = float(np.mean(losses[1]) - np.mean(losses[0]))
    bend = (moved - slope) / default
    is_bowl = math.isfinite(bend) and slope < 0 < bend
    return Finding(-slope / bend if is_bowl else None, (TriedRate(default, change),))


def prodigy(probe: Probe, steps: float, default: float) -> Finding:
    """Return Prodigy's estimate of the distance to the solution, which is its rate for Adam.

    The estimate d only grows. A parameter whose rate is a multiple of A's is measured in units of
    that multiple, so that d is the rate of A.
    """
    beta_1, beta_2 = 0.9, 0.999
    config = probe.state.optimizer.config
    multiples = {"lora_b": config.lr_ratio or 1.0, "magnitude": config.magnitude_lr_ratio}
    unit = {
        name: multiples.get(group, 1.0)
        for name, group in probe.state.optimizer.groups.items()
        if group != "embedding"  # embeddings have a rate of their own
    }

    # Adam's moments, and the sums that the estimate is computed from.
    start = probe.parameters()
    moved = {name: mx.zeros(start[name].shape) for name in unit}
    first, second, summed = dict(moved), dict(moved), dict(moved)
    rate, numerator = default / SPAN, 0.0

    still = {name: mx.zeros_like(array) for name, array in start.items()}
    tried: list[TriedRate] = []
    for _ in range(max(1, int(steps))):
        loss, found = probe.gradients()
        if not math.isfinite(loss):
            break

        # Raise the estimate if descent continues in the direction moved so far.
        gradients = {name: found[name] * unit[name] for name in unit}
        weight = (1 - math.sqrt(beta_2)) * rate**2
        numerator = math.sqrt(beta_2) * numerator - weight * _dot(gradients, moved)
        for name, gradient in gradients.items():
            first[name] = beta_1 * first[name] + (1 - beta_1) * rate * gradient
            second[name] = beta_2 * second[name] + (1 - beta_2) * mx.square(rate * gradient)
            summed[name] = math.sqrt(beta_2) * summed[name] + weight * gradient
        size = _total([mx.abs(each).sum() for each in summed.values()])
        rate = max(rate, numerator / size if size else 0.0)

        # Make Adam's step at the new rate.
        for name in unit:
            step = first[name] / (mx.sqrt(second[name]) + 1e-8 * rate)
            moved[name] = moved[name] - rate * step
        mx.eval(first, second, summed, moved)
        probe.move(still | {name: moved[name] * unit[name] for name in unit}, 1.0)
        tried.append(TriedRate(rate, loss))

    # Show the loss as its change since the first step.
    if not tried:
        return Finding(None, ())
    changes = tuple(TriedRate(each.rate, each.change - tried[0].change) for each in tried)
    grew = rate > default / SPAN
    return Finding(rate if grew else None, changes)


def trials(probe: Probe, steps: float, default: float) -> Finding:
    """Train briefly at several rates, then at the best two for longer; return the best rate."""
    rates = np.geomspace(default / _TRIAL_SPAN, default * _TRIAL_SPAN, _TRIAL_RATES).tolist()
    tried: list[TriedRate] = []
    for count in (_TRIAL_RATES, _KEPT_TRIALS):
        # Each round takes half of the work. A third of a trial's work is its judgement.
        work = steps / 2 / (count + FORWARD)
        judged = max(1, round(work / 3 / FORWARD))
        trained = max(1, round(work - judged * FORWARD))

        probe.restart(next_step=trained)
        untrained = probe.losses(judged)
        tried = []
        for rate in rates:
            probe.restart()
            for _ in range(trained):
                probe.step(rate)
            change = float(np.mean(probe.losses(judged) - untrained))
            tried.append(TriedRate(rate, change))
        ordered = sorted(tried, key=lambda each: _last_if_not_finite(each.change))
        rates = [each.rate for each in ordered[:_KEPT_TRIALS]]

    # The last round decides.
    best = min(tried, key=lambda each: _last_if_not_finite(each.change))
    return Finding(best.rate if best.change < 0 else None, tuple(tried))


METHODS: Mapping[str, RateMethod] = {
    method.name: method
    for method in (
        RANGE_TEST,
        RateMethod("line search", line_search, factor=1.0),
        RateMethod("curvature", curvature, factor=1.0),
        RateMethod("prodigy", prodigy, factor=1.0),
        RateMethod("trials", trials, factor=0.5),
    )
}
"""All methods by name. Their factors are provisional: a low rate is safer than a high one."""


def _first_direction(probe: Probe, default: float) -> dict[str, mx.array]:
    """Return the change that the optimizer's first steps make at a tiny rate, scaled to rate 1.

    Embeddings, which have a rate of their own, stay where they are.
    """
    start = probe.parameters()
    rate = _TINY * default
    for _ in range(_FIRST_STEPS):
        probe.step(rate)
    end = probe.parameters()

    groups = probe.state.optimizer.groups
    directions: dict[str, mx.array] = {}
    for name in start:
        moved = end[name].astype(mx.float32) - start[name].astype(mx.float32)
        directions[name] = moved * (0.0 if groups[name] == "embedding" else 1 / rate)
    return directions


def _dot(one: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> float:
    """Return the inner product of the arrays that both have."""
    return _total([(one[name] * other[name]).sum() for name in one.keys() & other.keys()])


def _total(scalars: list[mx.array]) -> float:
    """Return the sum of scalar arrays."""
    return float(np.array(sum(scalars, mx.array(0.0))))


def _last_if_not_finite(change: float) -> float:
    """Return the sort key of a change, which is infinite if the change is not finite."""
    return change if math.isfinite(change) else math.inf
