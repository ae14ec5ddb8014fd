"""Choose the prompts for sample answers: rows with short answers, or the user's own prompts."""

from dataclasses import dataclass, replace

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import TrainConfig
from ..errors import counted
from ..models.prompt_format import RAW_FORMS, PromptFormat
from .dataset import Examples
from .encode_prompt import encode_prompt
from .stored_rows import KIND_NAMES
from .tokenize import Example

_LONGEST_ANSWER = 64
"""Maximum number of tokens in a short answer, including the token that ends it."""


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt for a sample answer. If it comes from a row, ``expected`` is the row's answer."""

    source: str  # location of the row, such as "valid.jsonl:17"
    tokens: list[int]  # token ids of the prompt
    prompt: str
    expected: str | None
    length: int  # tokens to generate


def choose_eval_prompts(
    examples: Examples, config: TrainConfig, tokenizer: TokenizerWrapper, most: int
) -> list[EvalPrompt]:
    """Return rows whose last turn is short, each with the tokens before that turn as its prompt.

    Args:
        examples: The examples to choose from.
        config: The run's settings. The seed determines the random choice.
        tokenizer: The tokenizer that the examples were made with.
        most: Maximum number of prompts to return.
    """
    if config.data.train_on == "everything":
        return []

    # Rows of kind text have no prompt, and an undesirable answer is not expected.
    left_out = [KIND_NAMES.index(kind) for kind in ("text", "undesirable")]
    candidates = np.flatnonzero(~np.isin(examples.of_rows("kind"), left_out))
    eval_prompts: list[EvalPrompt] = []

    for index in np.random.default_rng(config.seed).permutation(candidates):
        if len(eval_prompts) == most:
            break
        example = examples[int(index)]

        # Skip long answers, which take too much time, and truncated answers, which have no end.
        prompt, answer, end = _divide_last_turn(example)
        if len(answer) >= _LONGEST_ANSWER or end not in tokenizer.eos_token_ids:
            continue
        eval_prompts.append(
            EvalPrompt(
                source=example.place,
                tokens=prompt,
                prompt=tokenizer.decode(prompt),
                expected=tokenizer.decode(answer),
                length=len(answer),
            )
        )

    return eval_prompts


def _divide_last_turn(example: Example) -> tuple[list[int], list[int], int]:
    """Return the tokens before the last turn, the turn's own tokens, and its end token."""
    # The last turn is the last run of supervised tokens.
    supervised = np.flatnonzero(example.supervised)
    begins_run = np.diff(supervised, prepend=-1) > 1
    first = supervised[np.flatnonzero(begins_run)[-1]]

    prompt = example.tokens[:first].tolist()
    turn = example.tokens[first : supervised[-1] + 1].tolist()
    return prompt, turn[:-1], turn[-1]


def own_eval_prompts(
    config: TrainConfig, tokenizer: TokenizerWrapper, form: PromptFormat
) -> list[EvalPrompt]:
    """Return the setting ``prompts``, each encoded in the format of the training rows."""
    eval_prompts: list[EvalPrompt] = []
    for prompt in config.prompts:
        tokens = encode_prompt(prompt, tokenizer, form=form)
        eval_prompts.append(
            EvalPrompt(
                source="", tokens=tokens, prompt=prompt, expected=None, length=_LONGEST_ANSWER
            )
        )
    return eval_prompts


def choose_format(
    examples: Examples, tokenizer: TokenizerWrapper
) -> tuple[PromptFormat, list[str]]:
    """Return the most common prompt format of the rows, and notes on rows that differ."""
    if tokenizer.has_chat_template:
        form, others = _choose_thinking(examples)
        prompted = "with thoughts" if form.thinking else "without thoughts"
    else:
        form, others = _choose_raw_form(examples)
        prompted = f"as {form.form} rows"

    # Training uses all rows, but generation supports only one format.
    notes: list[str] = []
    if others:
        notes.append(
            f"the prompt format of {counted(others, 'row')} differs from that of most rows;"
            f" generate and chat will render prompts {prompted}"
        )

    # Likewise, generation uses one system prompt.
    system, is_mixed = _choose_system(examples)
    if is_mixed:
        notes.append(
            "the rows have different system prompts; generate and chat will use none, unless"
            " --system gives one"
        )
    elif system is not None:
        notes.append(f"generate and chat will use the rows' system prompt: {system!r:.100}")
    return replace(form, system=system, mixed_systems=is_mixed), notes


def _choose_system(examples: Examples) -> tuple[str | None, bool]:
    """Return the system prompt of more than half of the rows, and whether the prompts are mixed.

    They are mixed if no prompt is that common, or if no table has kept it. A row without a system
    prompt counts as one with an empty prompt, which is returned as None. Rows of kind text do not
    count.
    """
    first = examples.first_of_rows()
    has_prompt = examples.of_rows("kind")[first] != KIND_NAMES.index("text")
    digests = examples.of_rows("system_digest")[first][has_prompt]
    found, counts = np.unique(digests, return_counts=True)
    if not len(found):
        return None, False
    if 2 * counts.max() <= counts.sum():
        return None, True

    common = int(found[np.argmax(counts)])
    for table in examples.tables:
        if common in table.systems:
            return table.systems[common], False
    return None, common != 0


def _choose_thinking(examples: Examples) -> tuple[PromptFormat, int]:
    """Return whether the prompts of most rows allow thoughts, and how many rows differ."""
    thinking = examples.of_rows("thinking")[examples.first_of_rows()].astype(bool)
    is_common = len(thinking) > 0 and bool(thinking.mean() > 0.5)
    return PromptFormat(thinking=is_common), int((thinking != is_common).sum())


def _choose_raw_form(examples: Examples) -> tuple[PromptFormat, int]:
    """Return the form of most prompts without a chat template, and how many rows differ."""
    form_names = np.array([name if name in RAW_FORMS else "completion" for name in KIND_NAMES])
    kinds = examples.of_rows("kind")[examples.first_of_rows()]
    forms = form_names[kinds[kinds != KIND_NAMES.index("text")]]
    if not len(forms):
        return PromptFormat(), 0

    found, counts = np.unique(forms, return_counts=True)
    form = PromptFormat.read({"form": str(found[np.argmax(counts)])})
    return form, int((forms != form.form).sum())
