"""All commands: the config and switches of each, and what it calls.

``mlx_loraplus train …`` and ``mlx_loraplus.train …`` are the same command. Heavy modules are
imported inside the commands, so that ``--help`` is fast.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import __version__
from .arguments import Output, Switches, command, given_names, log
from .command_config import (
    ChatConfig,
    CompareConfig,
    DoctorConfig,
    ExportConfig,
    FuseConfig,
    GenerateConfig,
    ServeConfig,
    SweepConfig,
)
from .config import TrainConfig
from .errors import ConfigError
from .interrupted_imports import INTERRUPTED
from .launching import check_batch_size, check_processes, launch
from .run_argument import (
    DEFAULT_RUN,
    AdapterSwitches,
    FuseSwitches,
    spell_out_adapters,
    with_run,
)
from .settings import setting_names, settings_of
from .userpaths import check_not_divided

Arguments = Sequence[str] | None  # None: the arguments of the process


@dataclasses.dataclass(frozen=True)
class TrainSwitches(Switches):
    """Options of ``train`` that are not settings."""

    launch: int = 1
    """Train with this many processes on this machine, which divide the work (see --parallel). For
    several machines, use mlx.launch."""
    list_models: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the models that have short names, and exit."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check everything that training would, print the data, settings, memory, time, disk space and
    the command to start, and exit; with exit code 2 if training would stop."""
    test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Evaluate the base and the adapter in adapter_path on the test rows, or on the validation rows
    if there are none, without training."""
    open: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Open the run's page, report.html, in the browser when training starts."""
    log_format: Literal["auto", "plain", "json"] = "auto"
    """auto: live display in a terminal, plain lines otherwise; plain: always plain lines; json:
    JSON lines."""
    verbosity: Literal["silent", "quiet", "normal", "verbose"] = "normal"
    """silent: nothing; quiet: warnings and the result; verbose: every number of a report."""


@dataclasses.dataclass(frozen=True)
class PlanSwitches(Switches):
    """Options of ``plan`` that are not settings."""

    purpose = "The memory of a training run, predicted before anything is downloaded."

    family: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Show the models whose short names contain one of these words, e.g. qwen, whether they fit or
    not; by default all that fit, or only the one of --model."""
    memory: str | None = None
    """Plan for a Mac of this size, e.g. 16GB, instead of this machine."""
    save_path: str | None = None
    """Also write the plan as a page (.html); --overwrite replaces an existing one."""


def train(arguments: Arguments = None) -> None:
    """Train LoRA+ adapters on a model."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.train", TrainConfig, words, TrainSwitches) as (asked, switches):
        if switches.list_models:
            from .models.find_model import list_models

            log(list_models())
            return
        if switches.launch != 1:
            if asked.parallel == "data":
                check_batch_size(asked.data.batch_size, switches.launch)
            check_processes(switches.launch)
            if not (switches.dry_run or switches.test):  # these need only one process
                raise SystemExit(launch(switches.launch, [*words, "--launch", "1"]))

        from .data.first_rows import check_rows
        from .inference.generate import load
        from .memory.run_sizes import check_fit
        from .runs.progress import make_view, with_browser
        from .runs.trackers import check_trackers
        from .training.checkpoint import check_folder
        from .training.distributed import World
        from .training.dry_run import rehearse
        from .training.evaluate import evaluate_run
        from .training.finetune import finetune
        from .training.given_adapter import with_adapters_model
        from .training.run_checks import check_model_name
        from .training.starting_adapter import with_recorded

        # What was not given may come from the adapter that the run starts from.
        given = given_names(TrainConfig, words)
        config = with_adapters_model(asked, given)
        given |= {"model"}
        if not asked.data.data:  # the demo set
            given.discard("data")
        settings = {name: value for name, value in settings_of(config).items() if name in given}
        config = with_recorded(config, settings)

        world = World.join(config.parallel)
        group = world.group if world.is_tensor_parallel else None

        # These options need only one process.
        if switches.dry_run and world.is_main:
            rehearse(config, settings, words)
        if switches.test and world.is_main:
            evaluate_run(config, given_names(TrainConfig, words))
        if switches.dry_run or switches.test:
            return

        verbosity = switches.verbosity if world.is_main else "silent"
        with make_view(switches.log_format, verbosity, Output()) as view:
            # Everything that can fail early is checked before the model is loaded.
            with world.sync_errors():
                check_model_name(config.model)
                if world.is_main:
                    check_trackers(config)
                    check_folder(config)
                check_rows(config)
                check_fit(config, group)
                view.log(f"loading {config.model}")
                model, tokenizer = load(config.model, group=group)

            callback = with_browser(view, view.log) if switches.open else view
            run = finetune(model, tokenizer, log=view.log, callback=callback, **settings)
        if run.outcome == "interrupted" and world.is_main:
            raise SystemExit(INTERRUPTED)


def generate(arguments: Arguments = None) -> None:
    """Answer a prompt."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.generate", GenerateConfig, words, AdapterSwitches) as parsed:
        if not words:
            raise ConfigError(
                "give a run or --model, and a prompt, as in mlx_loraplus.generate"
                f" {DEFAULT_RUN if Path(DEFAULT_RUN).exists() else 'my_run'} --prompt '...'"
            )
        config = with_run(*parsed, words)

        import mlx.core as mx

        from .adapters.stored_files import DEFAULT_MODEL
        from .data.encode_prompt import encode_prompt
        from .inference.generate import load, read_tools, stream, system_message
        from .models.prompt_format import format_of

        # Encode the prompt as training does.
        name = config.model
        if name is None and config.adapter_path is None:
            name = DEFAULT_MODEL
        model, tokenizer = load(name, config.adapter_path)
        tools = read_tools(config.tools, tokenizer, chat=config.chat)
        tokens = encode_prompt(
            sys.stdin.read() if config.prompt == "-" else config.prompt,
            tokenizer,
            chat=config.chat,
            earlier=system_message(model, config.system),
            form=format_of(model),
            tools=tools,
        )

        # Print the answer while it is generated.
        mx.random.seed(config.seed)
        answer = stream(
            model,
            tokenizer,
            tokens,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
        )
        for piece in answer:
            print(piece, end="", flush=True)
        print()


def chat(arguments: Arguments = None) -> None:
    """Chat with a model, with and without its adapter."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.chat", ChatConfig, words, AdapterSwitches) as parsed:
        config = with_run(*parsed, words)
        from rich.console import Console

        from .inference.chat import Conversation

        console = Console(file=Output(), highlight=False)  # pyright: ignore[reportArgumentType]
        Conversation(config, console).talk()


def plan(arguments: Arguments = None) -> None:
    """Predict a run's memory."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.plan", TrainConfig, words, PlanSwitches) as (asked, switches):
        from rich.console import Console

        from .files.page_path import check_save_path
        from .memory.plan_view import plan_run
        from .training.given_adapter import plan_from_adapter

        if switches.save_path is not None:
            check_save_path(switches.save_path, overwrite=asked.overwrite)
        given = given_names(TrainConfig, words)
        config = plan_from_adapter(asked, given, switches.family)
        is_named = "model" in given or asked.resume_adapter_file is not None
        plan = plan_run(config, switches.memory, switches.family, is_named=is_named)
        Console(soft_wrap=True).print(plan)
        if switches.save_path is not None:
            plan.save(switches.save_path, overwrite=config.overwrite)
            log(f"the page is {switches.save_path}")


def compare(arguments: Arguments = None) -> None:
    """Compare runs in a table and in curves."""
    with command("mlx_loraplus.compare", CompareConfig, arguments) as (config, _):
        from rich.console import Console

        from .files.page_path import check_save_path
        from .runs.compare import SAVED_AS, compare_runs

        if not config.runs:
            raise ConfigError("give the folders of runs, as in mlx_loraplus.compare run_a run_b")
        check_not_divided(config.runs)
        if config.save_path is not None:
            check_save_path(config.save_path, overwrite=config.overwrite, suffixes=SAVED_AS)
        comparison = compare_runs(*config.runs)
        Console(file=Output()).print(comparison)  # pyright: ignore[reportArgumentType]
        if config.save_path is not None:
            comparison.save(config.save_path, overwrite=config.overwrite)
            log(f"the curves are in {config.save_path}")


def serve(arguments: Arguments = None) -> None:
    """Show all runs in a folder in the browser, live."""
    with command("mlx_loraplus.serve", ServeConfig, arguments) as (config, _):
        from .runs.server import serve_folder

        serve_folder(config, log, time.time)


def export(arguments: Arguments = None) -> None:
    """Convert an adapter for other programs, or import one."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.export", ExportConfig, words, AdapterSwitches) as parsed:
        config = with_run(*parsed, words)
        from .export.export_command import check, export_adapter

        check(config)
        export_adapter(config, log)


def fuse(arguments: Arguments = None) -> None:
    """Merge adapters into their base, as a folder that stock mlx_lm loads."""
    words = spell_out_adapters(sys.argv[1:] if arguments is None else arguments)
    with command("mlx_loraplus.fuse", FuseConfig, words, FuseSwitches) as parsed:
        config = with_run(*parsed, words)
        from .export.fuse_command import fuse_folder

        fuse_folder(config, log)


def sweep(arguments: Arguments = None) -> None:
    """Find eta and lambda for a model and its data."""
    words = sys.argv[1:] if arguments is None else arguments
    with command("mlx_loraplus.sweep", SweepConfig, words) as (config, _):
        from rich.console import Console

        from .data.first_rows import check_rows, check_validates
        from .inference.generate import load
        from .sweep.sweep import sweep_rates
        from .sweep.sweep_folder import check_sweep_folder
        from .sweep.sweep_result import resume_sweep_command, train_best_command
        from .sweep.trial import run_config_of
        from .training.run_checks import check_model_name

        check_model_name(config.model)
        check_sweep_folder(config)
        run = run_config_of(config, setting_names(TrainConfig))
        check_rows(run)
        check_validates(run)
        # The folder and the data have been checked before the model is loaded.
        model, tokenizer = load(config.model)
        # Settings that were not given may come from the adapter that the trials start from.
        given = {"model"} | given_names(SweepConfig, words)
        if not config.data.data:  # the demo set
            given.discard("data")
        settings = {name: value for name, value in settings_of(config).items() if name in given}
        found = sweep_rates(model, tokenizer, log=log, **settings)
        Console(soft_wrap=True).print(found)

        if found.outcome == "finished":
            log(f"train: {train_best_command(config)}")
        else:
            log(f"{found.outcome}; to continue: {resume_sweep_command(config)}")
        if found.outcome == "interrupted":
            raise SystemExit(INTERRUPTED)


def doctor(arguments: Arguments = None) -> None:
    """Check this machine: versions, gradients and speed."""
    with command("mlx_loraplus.doctor", DoctorConfig, arguments) as (config, _):
        from .training.doctor import examine

        examine(config, log)


COMMANDS = {
    each.__name__: each
    for each in (train, generate, chat, plan, compare, serve, fuse, export, sweep, doctor)
}


def main(arguments: Arguments = None) -> None:
    """Run ``mlx_loraplus COMMAND …``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        sys.stderr.write(f"error: give a command\n{_usage()}\n")
        raise SystemExit(2)

    # Everything after the command's name is left to the command.
    name = words[0]
    if name == "help" and words[1:] and words[1] in COMMANDS:
        COMMANDS[words[1]](["--help", *words[2:]])
    elif name in ("-h", "--help", "--help-all", "help"):
        log(_usage())
    elif name == "--version":
        log(f"mlx_loraplus {__version__}")
    elif name in COMMANDS:
        COMMANDS[name](words[1:])
    else:
        from .unknown_commands import command_hint

        known = ", ".join(COMMANDS)
        hint = command_hint(words, COMMANDS)
        sys.stderr.write(f"error: {name!r} is not a command{hint}; give one of {known}\n")
        raise SystemExit(2)


def _usage() -> str:
    """Return the commands, each with the first line of its docstring."""
    width = max(map(len, COMMANDS))
    lines = ["usage: mlx_loraplus COMMAND [--help] …", "", "commands:"]
    for name, function in COMMANDS.items():
        purpose = (function.__doc__ or "").splitlines()[0]
        lines.append(f"  {name:{width}}  {purpose}")
    return "\n".join(lines)
