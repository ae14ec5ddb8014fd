"""mlx_loraplus.export: an adapter for other programs and the hub, or one from another program for this one."""

from collections.abc import Sequence

from ..commandline import Switches, run, tell
from .targets import ExportConfig, check, export


def main(arguments: Sequence[str] | None = None) -> None:
    """Export an adapter, or import one."""
    run("mlx_loraplus.export", ExportConfig, _export, arguments)


def _export(config: ExportConfig, _switches: Switches) -> None:
    check(config)
    export(config, tell)


if __name__ == "__main__":
    main()
