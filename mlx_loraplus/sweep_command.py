"""mlx_loraplus.sweep: the rates that suit a model and its rows."""

import shlex
from collections.abc import Sequence

from rich.console import Console

from .arguments import INTERRUPTED, command, tell
from .settings import settings_of
from .sweep.config_sweep import SweepConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Find eta and lambda for a model and a folder of examples."""
    with command("mlx_loraplus.sweep", SweepConfig, arguments) as (config, _):
        run_config = config.run_config()
        from .data.splits import check_rows
        from .inference.generate import load
        from .sweep.sweep import BEST, SETTINGS, check_sweep_folder, sweep_rates

        check_sweep_folder(config)
        check_rows(run_config)
        model, tokenizer = load(config.model)
        found = sweep_rates(model, tokenizer, tell=tell, **settings_of(config))
        Console(soft_wrap=True).print(found)
        folder = shlex.quote(config.adapter_path)
        if found.outcome == "finished":
            tell(f"train: mlx_loraplus.train -c {folder}/{BEST}")
        else:
            tell(f"{found.outcome}; go on: mlx_loraplus.sweep -c {folder}/{SETTINGS} --resume")
        if found.outcome == "interrupted":
            raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
