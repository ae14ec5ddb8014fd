"""Chat in the terminal with a base model and its adapter.

Both models share the base weights, but each has its own history.
"""

import re
import sys
from collections.abc import Iterator
from io import TextIOWrapper

import mlx.core as mx
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from ..adapters.storage import adapter_folder, load_adapter
from ..adapters.stored_files import check_is_adapter, is_model, model_for
from ..command_config import ChatConfig
from ..data.encode_prompt import content_of_answer
from ..data.template_check import check_template
from ..errors import LoRAPlusError, nearest
from ..models.loading import shared_copy
from ..models.prompt_format import format_of
from .generate import load, stream, system_message

COMMANDS = {
    "/base": "only the base model answers",
    "/adapter": "only the adapter answers",
    "/both": "both answer, side by side",
    "/temp": "/temp 0.7 sets the temperature; 0 always takes the most likely token",
    "/new": "start a new conversation",
    "/help": "list the commands",
    "/quit": "leave; Ctrl-D or pressing Ctrl-C twice also leaves",
}

# Minimum number of terminal columns for answers side by side.
_MIN_WIDTH = 60

# Lines of the screen besides the answers: the frame and head of their table, and the cursor.
_OTHER_LINES = 5

_TEMPERATURE = re.compile(r"\d+\.?\d*|\.\d+")


class Conversation:
    """A conversation with one or two models.

    Args:
        config: The models and the generation settings.
        console: Where answers are printed.

    Attributes:
        name: The name of the base model.
        models: "base" and, if one is loaded, "adapter"; or only "model", for a run with adapter
            full.
        active: Names of the models that answer.
        temperature: Sampling temperature.
        system: The system message, if the settings have one.
        history: The messages of the conversation with each model.
    """

    def __init__(self, config: ChatConfig, console: Console):
        self.config = config
        self.console = console

        # A model may stand in the place of the adapter, such as a run with adapter full. Its base
        # is not loaded, because it would take as much memory again.
        adapter_path, only = config.adapter_path, "base"
        if config.model is None and adapter_path is not None and is_model(adapter_path):
            self.name, adapter_path, only = adapter_path, None, "model"
        else:
            if adapter_path is not None:
                check_is_adapter(adapter_folder(adapter_path))
            self.name = model_for(config.model, adapter_path)

        # Both models use the prompt format of the adapter.
        base, self.tokenizer = load(self.name)
        if self.tokenizer.has_chat_template:
            check_template(self.tokenizer)
        self.models = {only: base}
        if adapter_path is not None:
            adapted = load_adapter(shared_copy(base), adapter_path)
            base.prompt_format = format_of(adapted)
            self.models["adapter"] = adapted

        self.active = list(self.models)
        self.temperature = config.temperature
        self.system = system_message(base, config.system)
        self.history: dict[str, list[dict[str, str]]] = {name: [] for name in self.models}
        mx.random.seed(config.seed)

    def talk(self) -> None:
        """Read lines from standard input and answer each of them, until the input ends."""
        # Replace bytes that are invalid in the terminal's encoding.
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

        interactive = sys.stdin.isatty()
        if interactive:
            # Importing readline enables line editing and history in input()
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]

            names = " and ".join(self.models)
            self.print(f"{names} of {self.name}; /help lists the commands")

        for line in self.lines("> " if interactive else ""):
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                else:
                    self.answer(line)
            except LoRAPlusError as error:
                # For example, the chat template refuses the conversation.
                self.print(f"error: {error}")

    def lines(self, prompt: str) -> Iterator[str]:
        """Yield the lines of standard input that are not empty.

        At the prompt, the first Ctrl-C discards the line and the second one ends the input.

        Args:
            prompt: Printed before each line. It is empty for piped input, which Ctrl-C ends.
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
                self.print("\npress Ctrl-C again to leave")
                continue

            leaving = not prompt
            if line:
                yield line

        # End the line, so that the shell's prompt starts on a new line.
        if prompt:
            self.print("")

    def command(self, line: str) -> None:
        """Execute a line that starts with a slash."""
        word, _, value = line.partition(" ")
        if word in ("/base", "/adapter", "/both"):
            self._choose_models(word)
        elif word == "/temp":
            self._set_temperature(value)
        elif word == "/new":
            self.history = {name: [] for name in self.models}
            self.print("started a new conversation")
        elif word == "/help":
            for name, meaning in COMMANDS.items():
                self.print(f"{name:<9} {meaning}")
        else:
            suggestion = nearest(word, COMMANDS)
            self.print(f"unknown command {word!r:.40}{suggestion}; /help lists the commands")

    def _choose_models(self, word: str) -> None:
        """Set which models answer: /base, /adapter or /both."""
        wanted = ["base", "adapter"] if word == "/both" else [word[1:]]
        if "model" in self.models:
            self.print("this model was trained as a whole, so no base and no adapter are loaded")
            return
        if not set(wanted) <= self.models.keys():
            self.print("no adapter is loaded: start again with --adapter-path")
            return
        self.active = wanted
        self.print(f"{' and '.join(wanted)} will answer")

    def _set_temperature(self, value: str) -> None:
        """Set the temperature from the argument of /temp."""
        if not _TEMPERATURE.fullmatch(value):
            self.print(f"/temp needs a number of at least 0, as in /temp 0.7, not {value!r:.40}")
            return
        self.temperature = float(value)
        self.print(f"temperature {self.temperature:g}")

    def answer(self, prompt: str) -> None:
        """Print the answers of the active models piece by piece; Ctrl-C ends them.

        A model without a chat template receives the system prompt and this prompt, but no earlier
        messages, as in training.
        """
        answers = dict.fromkeys(self.active, "")
        wide = self.console.is_terminal and self.console.width >= _MIN_WIDTH
        try:
            if len(answers) > 1 and wide:
                self._answer_in_columns(prompt, answers)
            else:
                self._answer_in_turn(prompt, answers)
        except KeyboardInterrupt:
            # The terminal has printed ^C, so start a new line.
            self.print("")

        # If an answer is interrupted, keep the part that was generated.
        for name, text in answers.items():
            content = content_of_answer(
                text,
                prompt,
                self.tokenizer,
                earlier=[*self.system, *self.history[name]],
                form=format_of(self.models[name]),
            )
            self.history[name] += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": content},
            ]

    def _answer_in_columns(self, prompt: str, answers: dict[str, str]) -> None:
        """Show the answers side by side while they grow, and print them whole at the end."""
        live = Live(console=self.console, auto_refresh=False, transient=True)
        try:
            with live:
                for name in answers:
                    for piece in self._stream(name, prompt):
                        answers[name] += piece
                        shown = {
                            each: _last_lines(text, self.console, len(answers))
                            for each, text in answers.items()
                        }
                        live.update(_side_by_side(shown), refresh=True)
        finally:
            self.console.print(_side_by_side(answers))

    def _answer_in_turn(self, prompt: str, answers: dict[str, str]) -> None:
        """Print the answers one after the other."""
        for name in answers:
            self.console.out(f"{name}: ", end="", highlight=False)
            for piece in self._stream(name, prompt):
                answers[name] += piece
                self.console.out(piece, end="", highlight=False)
            self.print("")

    def _stream(self, name: str, prompt: str) -> Iterator[str]:
        """Yield one model's answer piece by piece."""
        return stream(
            self.models[name],
            self.tokenizer,
            prompt,
            earlier=[*self.system, *self.history[name]],
            max_tokens=self.config.max_tokens,
            temperature=self.temperature,
        )

    def print(self, line: str) -> None:
        """Print a line unchanged, without interpreting markup."""
        self.console.print(Text(line))


def _last_lines(text: str, console: Console, columns: int) -> str:
    """Return the last lines of an answer, as many as a terminal shows in a table of columns.

    Lines that have scrolled off the top can't be redrawn, so each update would print them again.
    """
    width = max(1, (console.width - 1 - 3 * columns) // columns)
    lines = Text(text).wrap(console, width, overflow="fold")
    return "\n".join(line.plain for line in lines[-max(1, console.height - _OTHER_LINES) :])


def _side_by_side(answers: dict[str, str]) -> Table:
    """Return a table with one column for each answer."""
    columns = [Column(name, ratio=1) for name in answers]
    table = Table(*columns, expand=True)
    table.add_row(*(Text(answer, overflow="fold") for answer in answers.values()))
    return table
