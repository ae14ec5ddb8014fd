"""A talk in the terminal with a base and its adapter, which share the base's memory, each with its own history."""

import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from io import TextIOWrapper
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from ..adapters.storage import load_adapter
from ..config import ChatConfig
from ..errors import LoRAPlusError, nearest
from ..models.loading import shared_copy
from ..models.prompt_format import format_of
from .generate import load, stream

COMMANDS = {
    "/base": "the base alone answers",
    "/adapter": "the adapter alone answers",
    "/both": "both answer, side by side",
    "/temp": "/temp 0.7 sets the temperature; 0 takes the likeliest token each time",
    "/new": "forget what was said",
    "/help": "these lines",
    "/quit": "leave; so do Ctrl-D and two Ctrl-C",
}
_NARROW = 60  # columns, below which answers stand below each other


class Conversation:
    """What a talk knows: who answers, what was said, and how freely."""

    def __init__(self, config: ChatConfig, console: Console):
        self.config, self.console = config, console
        base, self.tokenizer = load(config.model)
        self.models = {"base": base}
        if config.adapter_path is not None:
            self.models["adapter"] = load_adapter(shared_copy(base), config.adapter_path)
            base.prompt_format = format_of(self.models["adapter"])  # both are asked alike
        self.shown = list(self.models)
        self.temperature = config.temperature
        self.said: dict[str, list[dict[str, str]]] = {name: [] for name in self.models}
        mx.random.seed(config.seed)

    def talk(self) -> None:
        """Answer lines of standard input until it ends."""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is no text in this encoding
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # lines can be edited and called back  # noqa: F401  # pyright: ignore[reportUnusedImport]

            self.print(
                f"{' and '.join(self.models)} of {self.config.model}; /help tells the commands"
            )
        for line in self.lines("> " if interactive else ""):
            if line == "/quit":
                return
            try:
                self.command(line) if line.startswith("/") else self.answer(line)
            except LoRAPlusError as error:  # such as a template that refuses the talk
                self.print(f"error: {error}")

    def lines(self, prompt: str) -> Iterator[str]:
        """Yield what is typed, or piped in without a prompt, but for empty lines.

        At the prompt Ctrl-C drops the line, and leaves where it comes twice in a row.
        """
        leaving = not prompt
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if leaving:
                    break
                leaving = True
                self.print("\nCtrl-C again leaves")
                continue
            leaving = not prompt
            if line:
                yield line
        if prompt:
            self.print("")  # the shell's own prompt begins a line

    def command(self, line: str) -> None:
        """Do what a line that starts with / says."""
        word, _, value = line.partition(" ")
        if word in ("/base", "/adapter", "/both"):
            wanted = list(self.models) if word == "/both" else [word[1:]]
            if wanted[0] not in self.models or (word == "/both" and len(wanted) == 1):
                self.print("there is no adapter: start again with --adapter-path")
            else:
                self.shown = wanted
                self.print(f"{' and '.join(wanted)} will answer")
        elif word == "/temp":
            if re.fullmatch(r"\d+\.?\d*|\.\d+", value):
                self.temperature = float(value)
                self.print(f"temperature {self.temperature:g}")
            else:
                self.print(
                    f"/temp takes a number of at least 0, as in /temp 0.7, not {value!r:.40}"
                )
        elif word == "/new":
            self.said = {name: [] for name in self.models}
            self.print("all is forgotten")
        elif word == "/help":
            for name, meaning in COMMANDS.items():
                self.print(f"{name:<9} {meaning}")
        else:
            self.print(f"{word!r:.40} is no command{nearest(word, COMMANDS)}; /help tells them")

    def answer(self, prompt: str) -> None:
        """Let the chosen models answer, piece by piece; Ctrl-C ends an answer where it is.

        A model without a chat template sees the prompt alone, as in training.
        """
        texts = dict.fromkeys(self.shown, "")
        columns = len(texts) > 1 and self.console.is_terminal and self.console.width >= _NARROW
        options: dict[str, Any] = {
            "max_tokens": self.config.max_tokens,
            "temperature": self.temperature,
        }
        live = Live(console=self.console, vertical_overflow="visible", auto_refresh=False)
        try:
            with live if columns else nullcontext():
                for name in texts:
                    if not columns:
                        self.console.out(f"{name}: ", end="", highlight=False)
                    for piece in stream(
                        self.models[name],
                        self.tokenizer,
                        prompt,
                        earlier=self.said[name],
                        **options,
                    ):
                        texts[name] += piece
                        if columns:
                            live.update(_side_by_side(texts), refresh=True)
                        else:
                            self.console.out(piece, end="", highlight=False)
                    if not columns:
                        self.print("")
        except KeyboardInterrupt:
            self.print("")  # behind the ^C that the terminal shows
        for name, text in texts.items():
            self.said[name] += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": text},
            ]

    def print(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(Text(line))


def _side_by_side(texts: dict[str, str]) -> Table:
    table = Table(*(Column(name, ratio=1) for name in texts), expand=True)
    table.add_row(*(Text(text, overflow="fold") for text in texts.values()))
    return table
