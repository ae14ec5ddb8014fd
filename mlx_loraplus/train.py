"""mlx_loraplus.train: a model and a folder of examples become an adapter."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from .arguments import INTERRUPTED, Output, Switches, command, given_names, tell
from .config import RunConfig
from .launching import launch
from .settings import settings_of


@dataclasses.dataclass(frozen=True)
class TrainSwitches(Switches):
    """What the command does besides its settings."""

    launch: int = 1
    """Train with so many processes on this machine, which share the work (--parallel); several machines: mlx.launch."""
    list_models: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the models that have a short name, and stop."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what training would make of the data, and stop; code 2 if it would refuse it."""
    test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train nothing: print how adapter_path's adapter does on the test rows, the base beside it, and stop."""
    log_format: Literal["auto", "plain", "json"] = "auto"
    """Lines, JSON lines, or by itself a picture that moves where there is a terminal and lines where there is none."""
    verbosity: Literal["silent", "quiet", "normal", "verbose"] = "normal"
    """quiet: warnings and the end; verbose: every number of a report."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train LoRA+ adapters on a model."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.train", RunConfig, words, TrainSwitches) as (config, switches):
        if switches.list_models:
            from .models.registry import list_models

            tell(list_models())
            return
        if switches.launch != 1:
            raise SystemExit(launch(switches.launch, [*words, "--launch", "1"]))
        from .data.splits import check_rows
        from .inference.generate import load
        from .memory.plan import check_fit
        from .preview import show
        from .runs.progress import make_view
        from .training.checkpoint import check_folder
        from .training.distributed import Team
        from .training.evaluate import evaluate_run
        from .training.finetune import finetune

        team = Team.join(config.parallel)
        group = team.group if team.splits_weights else None
        if switches.dry_run or switches.test:
            if team.leads:
                (show if switches.dry_run else evaluate_run)(config)
            return
        with make_view(switches.log_format, switches.verbosity if team.leads else "silent", Output()) as view:
            with team.together():
                if team.leads:
                    check_folder(config)
                check_rows(config)
                check_fit(config, group)
                view.tell(f"loading {config.model}")
                model, tokenizer = load(config.model, group=group)
            given = {"model"} | given_names(RunConfig, words)  # what was not may follow from adapters that are there
            settings = {name: value for name, value in settings_of(config).items() if name in given}
            outcome = finetune(model, tokenizer, tell=view.tell, watch=view, **settings).outcome
        if outcome == "interrupted" and team.leads:
            raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
