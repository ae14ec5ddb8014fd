"""mlx_loraplus.compare: runs side by side, in a table and in curves."""

from collections.abc import Sequence

from .arguments import Output, command, tell
from .config import CompareConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare runs."""
    with command("mlx_loraplus.compare", CompareConfig, arguments) as (config, _):
        from rich.console import Console

        from .runs.compare import check_save_path, compare_runs, save

        check_save_path(config)
        comparison = compare_runs(*config.runs)
        Console(file=Output()).print(comparison)  # pyright: ignore[reportArgumentType]  all of a file it needs
        if config.save_path is not None:
            save(comparison, config.save_path)
            tell(f"the curves are in {config.save_path}")


if __name__ == "__main__":
    main()
