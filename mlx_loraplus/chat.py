"""mlx_loraplus.chat: a talk with a base and its adapter, side by side."""

from collections.abc import Sequence

from .commandline import Output, Switches, run
from .config import ChatConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Talk to a model, with and without an adapter."""
    run("mlx_loraplus.chat", ChatConfig, _chat, arguments)


def _chat(config: ChatConfig, _switches: Switches) -> None:
    from rich.console import Console

    from .conversation import Conversation

    console = Console(file=Output(), highlight=False)  # pyright: ignore[reportArgumentType]  all of a file it needs
    Conversation(config, console).talk()


if __name__ == "__main__":
    main()
