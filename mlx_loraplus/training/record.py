"""What is kept of a run while it trains: its events, checkpoints, the adapter, and at the end a picture and a page."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import save_adapter
from ..errors import AdapterError, OutputError
from .checkpoint import Identity, checkpoint_folder, load_best, save_best, save_checkpoint
from .distributed import Team
from .folder import start_folder, write_history
from .history import PLOT, Run
from .loop import Event, Outcome
from .norms import measure_norms
from .opening import Questions
from .optimizer import LoRAPlus
from .plots import write_picture
from .progress import Tell, Watch
from .report import write_report


class Record:
    """Takes what the loop gives, and writes it in the run's folder; of several processes only the first writes.

    Args:
        run: What grows.
        model: What trains.
        tokenizer: For the answers.
        optimizer: With its state.
        identity: For the checkpoints.
        questions: To answer at every validation.
        team: The processes; all compute the same events.
        tell: Called with sentences.
        watchers: Called with events.
        compare: Called with the first report of updates and the peaks of memory up to it.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        optimizer: LoRAPlus,
        identity: Identity,
        questions: Questions,
        team: Team,
        tell: Tell,
        watchers: Sequence[Watch],
        compare: Callable[[Event, Sequence[float]], None],
    ):
        self.run, self.model, self.tokenizer, self.optimizer = run, model, tokenizer, optimizer
        self.identity, self.questions, self.team, self.tell, self.watchers = identity, questions, team, tell, watchers
        self.compare = compare
        self.measure = measure_norms(model)
        self.peaks: list[float] = []
        self.best: dict[str, mx.array] = {}  # the best adapter, as long as it is not on the disk
        self.unsaved: OutputError | None = None

    def show(self, event: Event) -> None:
        """Give an event to those who watch."""
        for watcher in self.watchers:
            watcher(self.run, event)

    def report(self, event: Event) -> None:
        """Take an event of the loop, and add what it does not know."""
        if "loss" in event:
            event |= self.measure()
        if "valid_loss" in event and self.questions.prompts:
            with self.team.computing():
                event["answers"] = self.questions.ask(self.model, self.tokenizer)
        self.run.history.append(event)
        self.show(event)
        self.peaks.append(mx.get_peak_memory())
        if "loss" in event and sum("loss" in past for past in self.run.history) == 1:
            self.compare(event, self.peaks)

    def save(self) -> None:
        """Write the best adapter if it is new, a checkpoint, the adapter and the history.

        Raises:
            OutputError: They can't be written, and ``on_save_error`` is stop.
        """
        if not self.team.leads:
            return
        run, progress = self.run, self.run.progress
        self.unsaved = None
        if progress.best_update == progress.update:
            self.best.update(tree_flatten(self.model.trainable_parameters()))
        try:
            if not run.folder.is_dir():
                self.tell(f"warning: {run.folder} has vanished: making it again")
                start_folder(run.config, run.history, anew=False)
            if self.best and progress.best_update is not None:
                save_best(run.folder, self.model, self.best, progress.best_update)
                self.best.clear()
            keep = run.config.keep_checkpoints
            save_checkpoint(run.folder, self.model, self.optimizer, progress, self.identity, run.history, keep)
            save_adapter(self.model, run.folder)
            write_history(run.folder, run.history)
        except OutputError as error:
            if run.config.on_save_error == "stop":
                raise OutputError(f"{error}; then --resume goes on from the checkpoint before") from None
            self.tell(f"warning: update {progress.update} is not saved, an older checkpoint is: {error}")
            self.unsaved = error

    def close(self, outcome: Outcome) -> None:
        """Write how the run ended: the adapter to keep, the last event, the picture and the page.

        Raises:
            OutputError: They, or the last checkpoint, can't be written.
        """
        run, progress = self.run, self.run.progress
        if self.unsaved:
            raise OutputError(f"the last updates are not saved: {self.unsaved}; then --resume goes on from before them")
        run.history.append(
            {
                "update": progress.update, "outcome": outcome, "best_update": progress.best_update,
                "best_loss": progress.best_loss, "seconds": progress.seconds,
            }
        )  # fmt: skip
        if not self.team.leads:
            return
        try:
            if run.finished:
                keep_best(run, self.model, self.tell)
                save_adapter(self.model, run.folder)
            write_history(run.folder, run.history)
            write_picture(run.plot(), run.folder / PLOT)
            write_report(run)
        except KeyboardInterrupt:
            self.tell(f"warning: {outcome}, all updates are saved, but not all files are written: --resume writes them")
            raise
        self.show(run.history[-1])


def keep_best(run: Run, model: nn.Module, tell: Tell) -> None:
    """Put the adapter of the best validation back on the model, if that was not the last."""
    progress, losses = run.progress, run.losses("valid_loss")
    best = progress.best_update
    if best and progress.best_loss is not None and losses[0][0] == 0 and losses[0][1] < progress.best_loss:
        tell(
            f"warning: no validation was better than {losses[0][1]:.4f}, the loss before training "
            f"(best {progress.best_loss:.4f}): try a lower --learning-rate, or more rows"
        )
    if best is None or best == progress.update:
        return
    place = f"the best validation loss, {progress.best_loss:.4f}, was at update {best}"
    try:
        load_best(run.folder, model, best)
    except AdapterError as problem:
        tell(f"warning: {place}, but that adapter is lost, so the last is kept: {problem}")
        return
    tell(f"{place}: its adapter is kept (the last is in {checkpoint_folder(run.folder, progress.update)})")
