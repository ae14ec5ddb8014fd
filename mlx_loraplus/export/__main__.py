"""mlx_loraplus.export: an adapter for other programs and the hub, or one from another program for this one."""

from collections.abc import Sequence

from ..arguments import command, tell
from .targets import ExportConfig, check, export


def main(arguments: Sequence[str] | None = None) -> None:
    """Export an adapter, or import one."""
    with command("mlx_loraplus.export", ExportConfig, arguments) as (config, _):
        check(config)
        export(config, tell)


if __name__ == "__main__":
    main()
