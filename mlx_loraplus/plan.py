"""mlx_loraplus.plan: what fits on this machine, before anything is downloaded."""

import dataclasses
from collections.abc import Sequence

from .arguments import Switches, command
from .config import RunConfig
from .settings import settings_of


@dataclasses.dataclass(frozen=True)
class PlanSwitches(Switches):
    """What the command does besides its settings."""

    memory: str | None = None
    """Plan for a Mac of this size, e.g. 16GB, instead of this machine."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan a run's memory."""
    with command("mlx_loraplus.plan", RunConfig, arguments, PlanSwitches) as (config, switches):
        from rich.console import Console

        from .memory.plan import plan_memory

        Console(soft_wrap=True).print(plan_memory(memory=switches.memory, **settings_of(config)))


if __name__ == "__main__":
    main()
