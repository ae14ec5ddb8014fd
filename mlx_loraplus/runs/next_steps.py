"""What a run says at its end: the result, and what can be done next."""

from ..adapters.stored_files import UNKNOWN_MODEL
from ..userpaths import shell_word
from .advice import describe_skipped, give_advice, longer_command, lower_rate_command
from .history import SETTINGS, Run
from .state import BAD_BATCH


def closing(run: Run) -> list[str]:
    """Return the last lines: the outcome, the verdict, the files and the next commands."""
    # The result, and whether to train longer.
    last = run.history[-1]
    outcome = f"{run.outcome} at step {last['step']}"
    if last["best_step"] is not None:
        loss = last["best_loss"]
        outcome += f", best at step {last['best_step']} (validation loss {loss:.4f})"
    verdict = run.verdict
    lines = [outcome, *verdict.summary()]
    # The error that ends a failed run says itself why, and what to do.
    if run.outcome != "failed" and run.progress.skipped:
        rows = run.folder / BAD_BATCH
        lines.append(f"{describe_skipped(run.progress)}; the rows of the last one are in {rows}")
    if run.outcome != "failed" and (advice := give_advice(run, verdict)):
        lines.append(advice.text)

    result = "model" if run.config.adapter.adapter == "full" else "adapter"
    files = f"{result}, checkpoints, run.yaml, history.jsonl, loss.png and report.html"
    lines.append(f"{files} are in {run.folder}")

    # The next commands are aligned.
    for label, command in next_commands(run):
        lines.append(f"{label + ':':<8} {command}")
    return lines


def next_commands(run: Run) -> list[tuple[str, str]]:
    """Return what can be done with a run that has ended, as (label, command ready to paste)."""
    commands: list[tuple[str, str]] = []
    trend = run.verdict.trend

    # A run that skipped most steps keeps no useful adapter. One that diverged keeps its best one,
    # but only at its end.
    mostly_skipped = run.progress.mostly_skipped
    keeps_best = run.finished and run.progress.best_step is not None
    diverged = trend == "diverged" or mostly_skipped
    if diverged and (command := lower_rate_command(run)):
        commands.append(("again", command))
    if diverged and (mostly_skipped or not keeps_best):
        return commands
    if not run.finished:
        commands.append(("resume", resume_command(run)))
    elif (advice := give_advice(run, run.verdict)) and advice.is_longer:
        commands.append(("longer", longer_command(run)))

    # A run that was killed early has saved nothing yet.
    if not run.finished and not any(run.folder.glob("*.safetensors")):
        return commands

    folder = shell_word(run.folder)
    if run.config.model.endswith(UNKNOWN_MODEL):
        folder += " --model MODEL"
    commands.append(("try it", f"mlx_loraplus.chat {folder}"))
    if run.finished and run.config.adapter.adapter != "full":
        commands.append(("fuse it", f"mlx_loraplus.fuse {folder}"))
    return commands


def resume_command(run: Run) -> str:
    """Return the command that continues a run, ready to paste."""
    command = f"mlx_loraplus.train -c {shell_word(run.folder / SETTINGS)} --resume"
    if run.history[-1].get("checkpointing_helps"):
        command += " --grad-checkpoint on"
    return command
