"""mlx_loraplus.export: an adapter for other programs and the hub, or one from another program for this one."""

from collections.abc import Sequence

from ..commandline import Switches, parse, print_config, run, tell
from .targets import ExportConfig, check, export


def main(arguments: Sequence[str] | None = None) -> None:
    """Export an adapter, or import one."""
    run(_export, arguments)


def _export(arguments: Sequence[str]) -> None:
    config, switches = parse(ExportConfig, Switches, arguments, prog="mlx_loraplus.export")
    check(config)
    if switches.print_config:
        print_config(config)
    else:
        export(config, tell)


if __name__ == "__main__":
    main()
