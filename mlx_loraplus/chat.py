"""mlx_loraplus.chat: a talk with a base and its adapter, side by side."""

from collections.abc import Sequence

from .arguments import Output, command
from .config import ChatConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Talk to a model, with and without an adapter."""
    with command("mlx_loraplus.chat", ChatConfig, arguments) as (config, _):
        from rich.console import Console

        from .inference.chat import Conversation

        console = Console(file=Output(), highlight=False)  # pyright: ignore[reportArgumentType]  all of a file it needs
        Conversation(config, console).talk()


if __name__ == "__main__":
    main()
