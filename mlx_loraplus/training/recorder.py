"""Start or resume a run's history, and add information to each event of the training loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn

from ..adapters.trainable import TrainableParams
from ..data.batches import trimmed
from ..data.eval_prompts import EvalPrompt, choose_eval_prompts, choose_format, own_eval_prompts
from ..data.model_limits import check_prompt, limits_of
from ..errors import counted
from ..inference.generate import answer_length, answer_questions
from ..memory.compare_with_plan import compare_with_plan
from ..runs.advice import remedy_for_fall
from ..runs.start_event import measure_norms, start_event
from ..runs.state import Event
from ..runs.verdict import fall_of_chosen
from .checkpoint import Checkpoint, restore
from .compiled import should_compile
from .fastest_step import way_of
from .session import Session
from .trainer import TrainState

OnEvent = Callable[[Event], None]


def choose_prompts(model: nn.Module, session: Session) -> list[EvalPrompt]:
    """Return the prompts that are answered at every validation."""
    config, tokenizer, examples = session.config, session.tokenizer, session.examples

    # Some examples of the validation data.
    eval_prompts = choose_eval_prompts(examples["valid"], config, tokenizer, config.sample_rows)

    # The format is stored with the adapter, so that later prompts have it as well.
    prompt_format, notes = choose_format(examples["train"], tokenizer)
    model.prompt_format = prompt_format
    for note in notes:
        session.log(f"note: {note}")

    # The user's own prompts, which the model must be able to read.
    own = own_eval_prompts(config, tokenizer, prompt_format)
    limits = limits_of(model)
    for prompt in own:
        check_prompt(limits, prompt.tokens, prompt.length, tokenizer)
    return eval_prompts + own


def start_history(
    session: Session,
    state: TrainState,
    trainable: TrainableParams,
    eval_prompts: list[EvalPrompt],
    reference: str | None,
    rows: str,
) -> None:
    """Start the run's history with an event that describes the training.

    Args:
        session: The session.
        state: What the training loop works on.
        trainable: The parameters that train.
        eval_prompts: The prompts to answer.
        reference: A digest of the model that answers are compared with, if there is one.
        rows: The digests of the splits, as in ``RunFingerprint``.
    """
    run = session.run
    event = start_event(
        state.model,
        run.config,
        state.schedule.steps,
        session.examples,
        trainable,
        state.batches,
        grad_checkpoint=state.grad_checkpoint,
    )
    for name, digest in zip(session.examples, rows.split(), strict=True):
        event[name]["digest"] = digest
    event["prompts"] = [{"prompt": each.prompt, "expected": each.expected} for each in eval_prompts]
    if eval_prompts:
        event["answer_tokens"] = answer_length(eval_prompts)
    if state.probes is not None:
        event["probes"] = asdict(state.probes)

    # A resumed run must have the same reference.
    if reference is not None:
        event["reference"] = reference

    # How a step is computed, and how that and the rate were found.
    event["choices"] = asdict(way_of(state, run.config))
    if state.self_check:
        event["self_check"] = state.self_check
    if state.rate_search is not None:
        event["found_rate"] = state.rate_search

    # A measured peak is better than the planned one.
    if state.measured is not None:
        event["memory"]["planned_gb"] = state.measured.peak / 1e9
    run.history.append(event)
    run.planned = state.schedule.steps


def resume_history(session: Session, state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue the history of the checkpoint, and restore its adapter and optimizer state."""
    run, steps = session.run, state.schedule.steps
    restore(checkpoint, state.model, state.optimizer)
    run.history = checkpoint.history
    if run.progress.step < steps:
        session.log(f"resume: from step {run.progress.step} of {steps}")
    elif run.progress.owes_validation:
        session.log("resume: only the last validation is left")
    else:
        session.log(
            f"resume: nothing is left to train, because the run has made {run.progress.step} of"
            f" {counted(steps, 'step')}: raise --iters or --epochs"
        )

    # The number of steps may have changed. The page says where the run was resumed.
    start = run.history[0]
    run.planned = start["steps"] = steps
    if run.progress.owes_validation or run.progress.ended(steps, run.config) is None:
        start["resumed"] = sorted({*start.get("resumed", []), run.progress.step})


def record_events(
    session: Session, state: TrainState, eval_prompts: Sequence[EvalPrompt]
) -> OnEvent:
    """Return the function that the training loop calls with each event.

    The function adds values that the loop does not have, appends the event to the history, and
    shows the event. All processes of a run record the same events.
    """
    add_norms = norm_recorder(state)
    add_answers = answer_recorder(session, state, eval_prompts)
    check_memory = memory_checker(session, state)
    check_chosen = chosen_checker(session)

    def record(event: Event) -> None:
        add_norms(event)
        add_answers(event)
        session.run.history.append(event)
        session.show(event)
        check_memory(event)
        check_chosen(event)

    return record


def norm_recorder(state: TrainState) -> OnEvent:
    """Return a function that adds the adapters' norms to each report of the loss."""
    measure = measure_norms(state.model)

    def add_norms(event: Event) -> None:
        if "loss" in event:
            event.update(measure())

    return add_norms


def answer_recorder(
    session: Session, state: TrainState, eval_prompts: Sequence[EvalPrompt]
) -> OnEvent:
    """Return a function that adds the model's answers to each validation."""

    def add_answers(event: Event) -> None:
        if "valid_loss" not in event or not eval_prompts:
            return
        started = time.perf_counter()
        with session.world.computing():
            event["answers"] = answer_questions(state.model, session.tokenizer, eval_prompts)
        event["answer_seconds"] = time.perf_counter() - started

    return add_answers


def chosen_checker(session: Session) -> OnEvent:
    """Return a function that warns, once, if training makes the chosen answers less likely."""
    has_warned = False

    def check_chosen(event: Event) -> None:
        nonlocal has_warned
        if has_warned or "valid_logp_chosen" not in event:
            return

        fall = fall_of_chosen(session.run.history)
        if fall is not None:
            has_warned = True
            remedy = remedy_for_fall(session.config.objective.objective)
            session.log(f"warning: at step {event['step']} {fall}: {remedy}")

    return check_chosen


def memory_checker(session: Session, state: TrainState) -> OnEvent:
    """Return a function that compares the memory of the first steps with the plan, once."""
    run = session.run
    peaks: list[float] = []  # at each event of this session, in bytes

    def check_memory(event: Event) -> None:
        peaks.append(mx.get_peak_memory())
        is_first_report = "loss" in event and len(run.losses()) == 1
        if not is_first_report or state.measured is not None:
            return

        shapes = _trained_shapes(session, state, steps=event["step"])
        compare_with_plan(
            run.config,
            state.model,
            shapes,
            peaks,
            session.log,
            checkpoint=state.grad_checkpoint,
        )

    return check_memory


def _trained_shapes(session: Session, state: TrainState, *, steps: int) -> set[tuple[int, int]]:
    """Return the shapes (rows, length) of this process's batches up to a step, as it runs them."""
    compiled = should_compile(session.config) if state.compiled is None else state.compiled
    shapes: set[tuple[int, int]] = set()
    for number in range(steps * session.config.grad_accumulation_steps):
        # An uneven batch leaves some processes without rows.
        rows = state.batches.rows_of(number)[session.world.row_slice]
        if rows:
            batch = state.batches.collate(rows)
            row_count, length = (batch if compiled else trimmed(batch)).tokens.shape
            shapes.add((row_count, length))
    return shapes
