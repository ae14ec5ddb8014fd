"""What a run writes into its folder: checkpoints and the adapter, and at the end its report."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import yaml
from mlx.utils import tree_flatten

from ..adapters.damaged_files import CHECKPOINTS
from ..adapters.full import trains_weights
from ..adapters.storage import write_trained
from ..adapters.stored_files import CONFIG, MODULES, WEIGHTS
from ..config import TrainConfig
from ..device import gb
from ..errors import AdapterError, DeviceError, LoRAPlusError, OutputError
from ..failures import MEMORY, failure_of, reason_text
from ..files import remove_leftovers, write_atomically
from ..models.save_model_folder import remove_model_files
from ..runs.advice import find_failure
from ..runs.history import FUSED, HISTORY, PLOT, REPORT, RESIDUALS, SETTINGS, TRACKERS, Run
from ..runs.matplotlib_plots import write_picture
from ..runs.next_steps import resume_command
from ..runs.progress import Log
from ..runs.report import write_report
from ..runs.run_folder import holds_full_run, newest_step
from ..runs.start_event import versions
from ..runs.state import BAD_BATCH, Event, Outcome
from .checkpoint import (
    checkpoint_folder,
    load_best,
    remove_checkpoints,
    save_best,
    save_checkpoint,
    write_history,
)
from .fastest_step import way_of
from .interrupts import write_bad_batches
from .run_fingerprint import RunFingerprint, identifying_settings
from .schedule import batches_of_step
from .session import Session
from .step_choices import machine_facts
from .trainer import TrainState

_MAX_REASON = 500  # characters of an error in the history


@dataclass
class RunWriter:
    """Writes a run's folder; only the main process does.

    Attributes:
        unsaved_best: The arrays of the best adapter, until they are on the disk.
        save_error: Why the last save failed, or None if it succeeded.
    """

    session: Session
    state: TrainState
    identity: RunFingerprint
    unsaved_best: dict[str, mx.array] = field(default_factory=dict)
    save_error: OutputError | None = None

    def save(self) -> None:
        """Write the best adapter if it is new, a checkpoint, the adapter and the history.

        Raises:
            OutputError: They can't be written, and ``on_save_error`` is stop.
        """
        if not self.session.world.is_main:
            return
        progress, config = self.state.progress, self.session.config

        # Keep the best adapter in memory as well, in case it can't be written now.
        if progress.best_step == progress.step:
            self.unsaved_best.update(tree_flatten(self.state.model.trainable_parameters()))

        self.save_error = None
        try:
            self._write()
        except OutputError as error:
            if config.on_save_error == "stop":
                raise OutputError(
                    f"{error}; then resume from the previous checkpoint with --resume"
                ) from None
            self.session.log(
                f"warning: step {progress.step} is not saved, the previous checkpoint is kept:"
                f" {error}"
            )
            self.save_error = error

    def _write(self) -> None:
        """Write the files of a save; see ``save``."""
        run, state = self.session.run, self.state
        if not run.folder.is_dir():
            self.session.log(f"warning: {run.folder} has vanished and is created again")
            start_folder(run, state, anew=False)

        # Write the best adapter first, because the checkpoint refers to it.
        best_step = state.progress.best_step
        if self.unsaved_best and best_step is not None:
            save_best(run.folder, state.model, self.unsaved_best, best_step)
            self.unsaved_best.clear()

        save_checkpoint(
            run.folder,
            state.model,
            state.optimizer,
            state.progress,
            self.identity,
            run.history,
            keep=run.config.keep_checkpoints,
        )
        write_trained(state.model, self.session.tokenizer, run.folder)
        write_history(run.folder, run.history)

    def finish(self, outcome: Outcome) -> None:
        """Record how the run ended, and write the adapter, the plot and the report.

        Raises:
            LoRAPlusError: On all processes, if more than half of the steps were skipped, or if the
                adapter's validation loss is not a number.
            OutputError: The last checkpoint or one of these files can't be written.
        """
        try:
            with self.session.world.sync_errors():
                self._finish(outcome)
        except OutputError as error:
            self.record_error(error)
            raise

    def _finish(self, outcome: Outcome) -> None:
        """Record the end and write the last files; see ``finish``."""
        run, progress = self.session.run, self.state.progress
        if self.save_error is not None:
            raise OutputError(
                f"the last steps are not saved: {self.save_error}; then repeat them with --resume"
            )

        # Record the end. If the run is complete, ``run.finished`` is true from here on.
        failure = None if outcome == "interrupted" else find_failure(run)
        event = self._end_event("failed" if failure else outcome)
        if failure:
            event["reason"] = failure[0]
        run.history.append(event | run.verdict.stored())

        # Write the files that are complete only now.
        try:
            if self.session.world.is_main:
                self._write_results()
                if progress.skipped:
                    self._write_last_skipped()
        except KeyboardInterrupt:
            self.session.log(
                f"warning: {outcome}: all steps are saved, but some files are not written yet;"
                " --resume writes them"
            )
            raise
        self.session.show(run.history[-1])

        if failure:
            raise LoRAPlusError("; ".join(failure))

    def _write_results(self) -> None:
        """Write the final adapter if the run is complete, then the history and its pictures."""
        run = self.session.run
        if run.finished:
            self._write_final_adapter()
        write_history(run.folder, run.history)
        write_picture(run.plot(), run.folder / PLOT)
        write_report(run)

    def _write_last_skipped(self) -> None:
        """Write the batches of the last step that was skipped."""
        event = [event for event in self.session.run.history if "skipped" in event][-1]
        numbers = batches_of_step(event["step"], self.state.schedule)
        batches = [self.state.batches[number] for number in numbers]
        write_bad_batches(self.session.run.folder, event["step"], event["reason"], batches)

    def _write_final_adapter(self) -> None:
        """Restore the adapter of the best validation if it is not the last one, and write it."""
        model = self.state.model
        _restore_best(self.session.run, model, self.session.log)
        write_trained(model, self.session.tokenizer, self.session.run.folder)

    def record_error(self, error: Exception, *, checkpointing_helps: bool = False) -> None:
        """Record in the history and on the page that an error has ended the run.

        Nothing else is written, because the arrays on the device may be lost. The error matters
        more than a history that can't be written.

        Args:
            error: The error.
            checkpointing_helps: Whether memory ran out, and gradient checkpointing would need less.
        """
        run = self.session.run
        reason = reason_text(error)[:_MAX_REASON]
        event = self._end_event("failed") | {"reason": reason}
        if checkpointing_helps:
            event["checkpointing_helps"] = True

        # A session whose last files can't be written has recorded its end already.
        if "outcome" in run.history[-1]:
            run.history.pop()
        run.history.append(event)
        if self.session.world.is_main:
            with suppress(OutputError):
                write_history(run.folder, run.history)
                write_report(run)

    def record_failure(self, error: DeviceError) -> DeviceError:
        """Record that the device failed, and return the error with how to continue."""
        run, progress = self.session.run, self.state.progress
        is_memory = failure_of(error.__cause__) is MEMORY
        self.record_error(error, checkpointing_helps=is_memory and self.state.can_checkpoint)
        if not self.session.world.is_main:
            return error

        # Say what is saved, and which command continues from there.
        saved = newest_step(run.folder)
        kept = "no step is saved" if saved is None else f"step {saved:,} is saved"
        return DeviceError(
            f"{error}; the run stopped after step {progress.step:,}, and {kept}; to continue:"
            f" {resume_command(run)}"
        )

    def _end_event(self, outcome: Outcome) -> Event:
        """Return the last event of a session."""
        progress = self.state.progress
        return {
            "step": progress.step,
            "outcome": outcome,
            "best_step": progress.best_step,
            "best_loss": progress.best_loss,
            "seconds": progress.seconds,
        }


def with_choices(
    identity: RunFingerprint, state: TrainState, config: TrainConfig
) -> RunFingerprint:
    """Return a run's fingerprint with the choices that were made after it was computed."""
    return replace(
        identity,
        settings=identifying_settings(state.model, config),
        grad_checkpoint=state.grad_checkpoint,
        probes=state.probes,
        choices=state.choices,
        compiled=state.compiled,
        measured=state.measured,
        machine=machine_facts(),
    )


def start_folder(
    run: Run,
    state: TrainState,
    *,
    anew: bool,
    residuals: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write the run's settings, for ``-c run.yaml``, and its history so far.

    Args:
        run: The run that starts or resumes.
        state: What the run trains, and how.
        anew: Whether the run starts from the beginning. Files of an earlier run are then removed.
        residuals: The errors of quantizing the base, if it was quantized when the run started.
    """
    # Remove incomplete files, and the record of fusing, which training makes outdated.
    folder = run.folder
    for place in (folder, folder / CHECKPOINTS):
        remove_leftovers(place)
    (folder / FUSED).unlink(missing_ok=True)

    # Remove the files of an earlier run.
    if anew:
        remove_checkpoints(folder)
        if holds_full_run(folder):
            remove_model_files(folder)
        for name in (
            WEIGHTS,
            CONFIG,
            MODULES,
            HISTORY,
            PLOT,
            REPORT,
            RESIDUALS,
            BAD_BATCH,
            TRACKERS,
        ):
            (folder / name).unlink(missing_ok=True)

    # ``resume`` and ``overwrite`` only affect how the folder is used; they are not stored.
    config = replace(run.config, resume=False, overwrite=False)
    settings = identifying_settings(state.model, config)
    text = yaml.safe_dump(settings, sort_keys=False) + _describe_machine(state)
    text += f"# Chosen for this machine, and kept by --resume: {way_of(state, run.config)}\n"
    write_atomically(folder / SETTINGS, text.encode())
    write_history(folder, run.history)
    if residuals:
        write_atomically(folder / RESIDUALS, json.dumps(residuals, indent=1).encode())


def _describe_machine(state: TrainState) -> str:
    """Return a comment that says where a run computes, with which versions, and what it takes."""
    parts = [*machine_facts().values(), *(f"{name} {each}" for name, each in versions().items())]
    step = state.measured
    if step is not None:
        shape = f"{step.rows} x {step.length:,} tokens"
        parts.append(f"{step.seconds:.3g} s/step and {gb(step.peak)} for {shape}")
    return f"# Machine: {', '.join(parts)}\n"


def _restore_best(run: Run, model: nn.Module, log: Log) -> None:
    """Restore the adapter of the best validation if it is not the last one."""
    progress = run.progress
    best = progress.best_step
    if best is None or progress.best_loss is None or best == progress.step:
        return

    found = f"the best validation loss, {progress.best_loss:.4f}, was at step {best}"
    try:
        load_best(run.folder, model, best)
    except AdapterError as problem:
        log(f"warning: {found}, but its checkpoint is lost, so the last one is kept: {problem}")
        return
    last = checkpoint_folder(run.folder, progress.step)
    kept = "its weights are kept" if trains_weights(model) else "its adapter is kept"
    log(f"{found}: {kept} (the last one is in {last})")
