"""The part of a run's report with its sample answers: prompts as chats, answers as differences."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..data.thoughts import find_open_tags
from ..pages.pages import AnswerCard, HTMLTable, Section, ShownAnswer
from ..pages.transcript import ChangeKind, Part, PartKind, chat_of, differences, parts_of
from .history import Run

_EMPTY = "(an empty answer)"


def answers_section(run: Run) -> Section | None:
    """Return the fixed prompts with the expected answer, the base's and the kept adapter's."""
    prompts = run.start.get("prompts", [])
    answers = dict(run.losses("answers"))
    if not prompts or not answers:
        return None

    columns = list(dict.fromkeys((min(answers), kept_step(run, answers))))
    cards: list[AnswerCard] = []
    for number, prompt in enumerate(prompts):
        expected = prompt["expected"]
        shown: list[ShownAnswer] = []
        if expected is not None:
            shown.append(shown_answer("expected", expected))
        for step in columns:
            answer = answers[step][number] if number < len(answers[step]) else ""
            name = _name_step(run, answers, step)
            shown.append(shown_answer(name, answer, expected, prompt["prompt"]))
        cards.append(AnswerCard(chat_of(prompt["prompt"]), shown))

    text = "Long answers are cut."
    if most := run.start.get("answer_tokens"):
        text = f"At most {most} tokens were generated for each; an answer that was cut ends with …"

    # Own prompts have no expected answers.
    if any(prompt["expected"] is not None for prompt in prompts):
        marks = (
            "Shaded words are not in the expected answer; crossed-out words are missing. An answer"
            " that is quite different is shaded whole."
        )
        text = f"{marks} {text}"
    return Section("Answers to fixed prompts", text, cards=cards)


def shown_answer(
    label: str, answer: str, expected: str | None = None, prompt: str = ""
) -> ShownAnswer:
    """Return an answer, with its differences from the expected one if that is known.

    Args:
        label: What the answer is called.
        answer: The answer.
        expected: The expected answer.
        prompt: The prompt, which may open a block of thoughts.
    """
    tags = find_open_tags(prompt)
    # An answer may have been cut while the model was thinking.
    is_cut = bool(answer.strip()) and tags is not None and tags[1] not in answer
    parts: list[Part] = [("thought", answer)] if is_cut else parts_of(answer)
    if not parts:
        return ShownAnswer(label, [("text", [("same", _EMPTY)])])
    if expected is None:
        return ShownAnswer(label, [(kind, [("same", text)]) for kind, text in parts])
    likeness = ""
    if answer.strip() == expected.strip():
        likeness = "✓ exact"
    elif "".join(answer.split()) == "".join(expected.split()):
        likeness = "exact, but for white space"
    return ShownAnswer(label, _compare_parts(parts_of(expected), parts), likeness)


def _compare_parts(
    expected: Sequence[Part], parts: Sequence[Part]
) -> list[tuple[PartKind, list[tuple[ChangeKind, str]]]]:
    """Return the parts of an answer in pieces, marked by how they differ from the expected ones.

    The first call is compared with the first expected call, and so on. Parts that a similar answer
    lacks follow at the end. Thoughts are not compared.
    """
    wanted: dict[PartKind, list[str]] = {"text": [], "call": [], "result": [], "thought": []}
    for kind, text in expected:
        wanted[kind].append(text)

    compared: list[tuple[PartKind, list[tuple[ChangeKind, str]]]] = []
    for kind, text in parts:
        pieces: list[tuple[ChangeKind, str]] = [("same", text)]
        if kind != "thought":
            pieces = differences(wanted[kind].pop(0) if wanted[kind] else "", text)
        compared.append((kind, pieces))

    # What a similar answer lacks is shown as well.
    changes = {change for kind, pieces in compared if kind != "thought" for change, _ in pieces}
    if "same" in changes:
        del wanted["thought"]
        for kind, lacking in wanted.items():
            compared.extend((kind, [("missing", text)]) for text in lacking)
    return compared


def _name_step(run: Run, answers: Mapping[int, Any], step: int) -> str:
    """Return the label of the answers at a step."""
    name = f"step {step:,}"
    if step == 0:
        name = "base" if run.config.resume_adapter_file is None else "start"
    if step and step == kept_step(run, answers):
        name += ", the best: kept" if step == best_step(run) else ", the last"
    return name


def other_answers(run: Run) -> HTMLTable | None:
    """Return the answers at the validations that have no column, prompt by prompt.

    Neighbouring validations with the same answer share a row.
    """
    prompts = [prompt["prompt"] for prompt in run.start.get("prompts", [])]
    answers = dict(run.losses("answers"))
    if not prompts or not answers:
        return None

    steps = [step for step in answers if step not in (min(answers), kept_step(run, answers))]
    rows: list[tuple[str, str, str]] = []
    for number, prompt in enumerate(prompts):
        last = " ".join(text for _, text in chat_of(prompt)[-1].parts)
        given = [step for step in steps if number < len(answers[step])]
        for answer, same in groupby(given, key=lambda step: answers[step][number].strip()):
            first, *others = (f"{step:,}" for step in same)
            when = f"{first} to {others[-1]}" if others else first
            rows.append((last[-80:], when, answer or _EMPTY))
    return HTMLTable(rows, ("prompt", "steps", "answer"), "Other answers") if rows else None


def kept_step(run: Run, answers: Mapping[int, Any]) -> int:
    """Return the step whose adapter is kept: the best one once the run has finished."""
    best = best_step(run)
    return max(answers) if best is None or best not in answers else best


def best_step(run: Run) -> int | None:
    """Return the step of the adapter that a finished run keeps, or None."""
    return run.progress.best_step if run.finished else None
