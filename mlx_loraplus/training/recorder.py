"""What is kept of a run while it trains: its events, checkpoints, the adapter, and at the end a picture and a page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import CONFIG, MODULES, WEIGHTS, save_adapter
from ..data.batches import Batches
from ..data.eval_prompts import EvalPrompt
from ..errors import AdapterError, LoRAPlusError, OutputError
from ..files import remove_leftovers, write_atomically
from ..inference.generate import answer_questions
from ..memory.plan import compare_with_plan
from ..runs.events import measure_norms
from ..runs.history import FUSED, HISTORY, PLOT, REPORT, RESIDUALS, SETTINGS, Run
from ..runs.plots import write_picture
from ..runs.progress import Callback, Log
from ..runs.report import write_report
from ..runs.state import BAD_BATCH, Event, Outcome
from ..settings import settings_of
from .checkpoint import (  # fmt: skip
    CHECKPOINTS,
    RunFingerprint,
    checkpoint_folder,
    load_best,
    remove_checkpoints,
    save_best,
    save_checkpoint,
    write_history,
)
from .distributed import World
from .optimizer import LoRAPlus


@dataclass
class RunRecorder:
    """Takes what the loop gives, and writes it in the run's folder; of several processes only the first writes."""

    run: Run  # which grows
    model: nn.Module
    tokenizer: TokenizerWrapper
    optimizer: LoRAPlus
    batches: Batches
    identity: RunFingerprint
    eval_prompts: Sequence[EvalPrompt]  # to answer at every validation
    world: World  # whose processes all compute the same events
    log: Log
    callbacks: Sequence[Callback]

    def __post_init__(self) -> None:
        self._measure = measure_norms(self.model)
        self._peaks: list[float] = []
        self._best: dict[str, mx.array] = {}  # the best adapter, as long as it is not on the disk
        self._unsaved: OutputError | None = None

    def show(self, event: Event) -> None:
        """Give an event to those who watch."""
        for watcher in self.callbacks:
            watcher(self.run, event)

    def report(self, event: Event) -> None:
        """Take an event of the loop, and add what it does not know."""
        run = self.run
        if "loss" in event:
            event |= self._measure()
        if "valid_loss" in event and self.eval_prompts:
            with self.world.computing():
                event["answers"] = answer_questions(self.model, self.tokenizer, self.eval_prompts)
        run.history.append(event)
        self.show(event)
        self._peaks.append(mx.get_peak_memory())
        if "loss" in event and len(run.losses()) == 1:
            made = range(event["step"] * run.config.grad_accumulation_steps)
            shares = [self.batches.rows_of(number)[self.world.share] for number in made]
            shapes = {
                self.batches.shape_of(rows) for rows in shares if rows
            }  # an uneven batch leaves some without
            compare_with_plan(
                run.config,
                self.model,
                shapes,
                self._peaks,
                self.log,
                checkpoint=self.identity.grad_checkpoint,
            )

    def save(self) -> None:
        """Write the best adapter if it is new, a checkpoint, the adapter and the history.

        Raises:
            OutputError: They can't be written, and ``on_save_error`` is stop.
        """
        if not self.world.is_main:
            return
        run, progress = self.run, self.run.progress
        self._unsaved = None
        if progress.best_step == progress.step:
            self._best.update(tree_flatten(self.model.trainable_parameters()))
        try:
            if not run.folder.is_dir():
                self.log(f"warning: {run.folder} has vanished: making it again")
                start_folder(run, anew=False)
            if self._best and progress.best_step is not None:
                save_best(run.folder, self.model, self._best, progress.best_step)
                self._best.clear()
            keep = run.config.keep_checkpoints
            save_checkpoint(
                run.folder, self.model, self.optimizer, progress, self.identity, run.history, keep
            )
            save_adapter(self.model, run.folder)
            write_history(run.folder, run.history)
        except OutputError as error:
            if run.config.on_save_error == "stop":
                raise OutputError(
                    f"{error}; then --resume goes on from the checkpoint before"
                ) from None
            self.log(f"warning: step {progress.step} is not saved, an older checkpoint is: {error}")
            self._unsaved = error

    def close(self, outcome: Outcome) -> None:
        """Write how the run ended: the adapter to keep, the last event, the picture and the page.

        Raises:
            OutputError: They, or the last checkpoint, can't be written.
        """
        run, progress = self.run, self.run.progress
        lost = outcome in ("finished", "stopped early") and progress.skipped >= progress.step
        if self._unsaved:
            raise OutputError(
                f"the last steps are not saved: {self._unsaved}; then --resume goes on from"
                " before them"
            )
        run.history.append(
            {
                "step": progress.step, "outcome": "failed" if lost else outcome,
                "best_step": progress.best_step, "best_loss": progress.best_loss, "seconds": progress.seconds,
            }
        )  # fmt: skip
        if not self.world.is_main:
            return
        try:
            if run.finished:
                keep_best(run, self.model, self.log)
                save_adapter(self.model, run.folder)
            write_history(run.folder, run.history)
            write_picture(run.plot(), run.folder / PLOT)
            write_report(run)
        except KeyboardInterrupt:
            self.log(
                f"warning: {outcome}, all steps are saved, but not all files are written:"
                " --resume writes them"
            )
            raise
        self.show(run.history[-1])
        if lost:
            raise LoRAPlusError(
                f"no step took effect: all {progress.step:,} were skipped, since a loss or a"
                f" gradient was not finite, so the adapter in {run.folder} is as it began; train"
                " anew with a lower --learning-rate or --lr-ratio, and check that the model"
                " answers at all (mlx_loraplus.generate)"
            )


def start_folder(run: Run, *, anew: bool) -> None:
    """Write the resolved settings, which ``-c run.yaml`` takes again, and the history so far.

    ``anew`` clears away what an earlier run left.
    """
    folder = run.folder
    for place in (folder, folder / CHECKPOINTS):
        remove_leftovers(place)
    (folder / FUSED).unlink(missing_ok=True)  # the adapter becomes another one
    if anew:
        remove_checkpoints(folder)
        for name in (WEIGHTS, CONFIG, MODULES, HISTORY, PLOT, REPORT, RESIDUALS, BAD_BATCH):
            (folder / name).unlink(missing_ok=True)
    settings = settings_of(
        replace(run.config, resume=False, overwrite=False)
    )  # these are about the folder
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    write_history(folder, run.history)


def keep_best(run: Run, model: nn.Module, log: Log) -> None:
    """Put the adapter of the best validation back on the model, if that was not the last."""
    progress, losses = run.progress, run.losses("valid_loss")
    best = progress.best_step
    if (
        best
        and progress.best_loss is not None
        and losses[0][0] == 0
        and losses[0][1] < progress.best_loss
    ):
        log(
            f"warning: no validation was better than {losses[0][1]:.4f}, the loss before training "
            f"(best {progress.best_loss:.4f}): try a lower --learning-rate, or more rows"
        )
    if best is None or best == progress.step:
        return
    place = f"the best validation loss, {progress.best_loss:.4f}, was at step {best}"
    try:
        load_best(run.folder, model, best)
    except AdapterError as problem:
        log(f"warning: {place}, but that adapter is lost, so the last is kept: {problem}")
        return
    log(
        f"{place}: its adapter is kept (the last is in"
        f" {checkpoint_folder(run.folder, progress.step)})"
    )
