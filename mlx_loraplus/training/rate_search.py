"""``learning_rate auto``: a run's rate, found on its own model, examples and batches.

The search takes the work of ``STEPS`` steps before the first step of the run, and changes nothing
but the rate. If it finds no rate, the run uses the default rate and reports the reason.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace

import pydantic

from ..config import TrainConfig
from ..errors import counted
from ..rich_display import RichDisplay
from ..runs.state import Event
from ..settings import default_rate
from .distributed import World
from .range_test import RANGE_TEST, RateMethod, TriedRate
from .rate_probe import probing
from .session import Session
from .trainer import TrainState

STEPS = 30
"""The work of a search, in steps: a tenth of a run of 300."""
MIN_STEPS = 8
"""An epoch must have at least this many steps, because a rate found on few examples is too high."""


@dataclass(frozen=True, repr=False)
class RateSearch(RichDisplay):
    """A search for the learning rate and its result.

    Attributes:
        rate: The rate eta for the run.
        default: The default rate.
        method: How it was searched.
        critical: The critical rate, which the method multiplies by its factor; None if none was
            found.
        tried: The rates that were tried, with the change of the loss.
        steps: The work of the search, in steps of the run.
        seconds: The time that it took.
        reason: Why the rate is the default; empty if it was found.
    """

    rate: float
    default: float
    method: str = RANGE_TEST.name
    critical: float | None = None
    tried: tuple[TriedRate, ...] = ()
    steps: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        work = counted(round(self.steps), "step")
        spent = f"{self.method}, the work of {work} in {self.seconds:.1f} s"
        if self.reason:
            after = f" ({spent})" if self.steps else ""
            return f"learning rate: the default, {self.rate:.3g}, because {self.reason}{after}"

        rates = [each.rate for each in self.tried]
        span = f"{min(rates):.2g} to {max(rates):.2g}"
        return (
            f"learning rate: {self.rate:.3g} was found ({spent}; tried {span}; critical"
            f" {self.critical:.3g}; the default is {self.default:.3g})"
        )

    def __rich__(self) -> str:
        return str(self)

    def stored(self) -> Event:
        """Return the search for the history, whose numbers must be finite."""
        event = asdict(self)
        event["tried"] = list(event["tried"])
        for each in event["tried"]:
            if not math.isfinite(each["change"]):
                each["change"] = None
        return event


def choose_rate(session: Session, state: TrainState) -> TrainState:
    """Set a run's learning rate if its setting is auto, to the same value on all processes.

    Args:
        session: The run's session; its config gets the rate.
        state: The run's state before its first step; its optimizer gets the rate.

    Returns:
        The state with a record of the search.
    """
    config, world = session.config, session.world
    if config.optimizer.learning_rate != "auto":
        return state

    # All processes search together, from the same parameters. The main process's rate counts.
    world.broadcast(state.model)
    found = search_rate(state, config, world)
    found = _from_json(world.gather(json.dumps(found.stored()))[0])

    session.log(str(found))
    state.optimizer.learning_rate = found.rate
    optimizer = replace(config.optimizer, learning_rate=found.rate)
    session.run.config = replace(config, optimizer=optimizer)
    return replace(state, rate_search=found.stored())


def search_rate(
    state: TrainState, config: TrainConfig, world: World, method: RateMethod = RANGE_TEST
) -> RateSearch:
    """Search for a run's learning rate before its first step.

    The model, the optimizer and the random state are the same afterwards, bit-exactly.

    Args:
        state: The run's state before its first step.
        config: The run's settings.
        world: The processes that train together; each of them calls this function.
        method: How the rate is searched.

    Raises:
        DeviceError: Memory ran out, or the GPU failed.
    """
    default = default_rate(config)
    reason = _reason_against(state)
    if reason:
        return RateSearch(default, default, method.name, reason=reason)

    started = time.perf_counter()
    with probing(state, config, world) as probe:
        found = method.find(probe, STEPS, default)
        steps = probe.spent

    # Round to three digits, so that the rate that is shown can be given as a setting.
    rate, reason = default, "no rate lowered the loss"
    if found.critical is not None:
        rate, reason = float(f"{method.factor * found.critical:.3g}"), ""
    return RateSearch(
        rate=rate,
        default=default,
        method=method.name,
        critical=found.critical,
        tried=found.tried,
        steps=round(steps, 2),
        seconds=round(time.perf_counter() - started, 3),
        reason=reason,
    )


def _reason_against(state: TrainState) -> str:
    """Return why a search is not possible for this run, or ""."""
    schedule = state.schedule
    steps_per_epoch = state.batches.per_epoch // schedule.batches_per_step
    if steps_per_epoch < MIN_STEPS:
        return (
            f"a search needs enough examples for {MIN_STEPS} steps, and the data has enough for"
            f" {steps_per_epoch}"
        )
    if schedule.steps < STEPS:
        return f"a search takes the work of {STEPS} steps, and the run has {schedule.steps}"
    return ""


def _from_json(text: str) -> RateSearch:
    """Return the search that another process has made."""
    values = json.loads(text)
    for each in values["tried"]:
        if each["change"] is None:
            each["change"] = math.nan
    return pydantic.TypeAdapter(RateSearch).validate_python(values)
