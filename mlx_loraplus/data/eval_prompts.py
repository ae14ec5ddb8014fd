"""Questions whose answers show what was learned: rows that have short ones, and the prompts of a run."""

from dataclasses import dataclass

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import RunConfig
from ..models.prompt_format import RAW_FORMS, PromptFormat
from .dataset import Examples
from .token_cache import KIND_NAMES
from .tokenize import encode_prompt

SHORT = 64  # tokens of an answer that is still asked for


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt, and the answer of its row."""

    source: str  # where that is
    tokens: list[int]  # of the prompt
    prompt: str
    expected: str | None
    length: int  # tokens that are expected


def choose_eval_prompts(
    examples: Examples, config: RunConfig, tokenizer: TokenizerWrapper, most: int
) -> list[EvalPrompt]:
    """Return at most ``most`` rows whose last turn is short, asked from the tokens before it; a choice by the seed."""
    if config.data.train_on == "everything":
        return []
    asked = np.flatnonzero(examples.of_rows("kind") != KIND_NAMES.index("text"))
    eval_prompts: list[EvalPrompt] = []
    for index in np.random.default_rng(config.seed).permutation(asked):
        if len(eval_prompts) == most:
            break
        example = examples[int(index)]
        learned = np.flatnonzero(example.supervised)
        first = learned[
            np.flatnonzero(np.diff(learned, prepend=-1) > 1)[-1]
        ]  # where the last turn begins
        *answer, end = example.tokens[first : learned[-1] + 1].tolist()
        if len(answer) < SHORT and end in tokenizer.eos_token_ids:
            prompt = example.tokens[:first].tolist()
            texts = tokenizer.decode(prompt), tokenizer.decode(answer)
            eval_prompts.append(EvalPrompt(example.source, prompt, *texts, len(answer)))
    return eval_prompts


def own_eval_prompts(
    config: RunConfig, tokenizer: TokenizerWrapper, form: PromptFormat
) -> list[EvalPrompt]:
    """Return the setting ``prompts`` as questions, each encoded as a training row's prompt is."""
    encoded = [encode_prompt(prompt, tokenizer, form=form) for prompt in config.prompts]
    return [
        EvalPrompt("", tokens, prompt, None, SHORT)
        for tokens, prompt in zip(encoded, config.prompts, strict=True)
    ]


def choose_format(
    examples: Examples, tokenizer: TokenizerWrapper
) -> tuple[PromptFormat, str | None]:
    """Return the format in which most rows are asked, and a note where others are asked otherwise."""
    first = examples.first_of_rows()
    if tokenizer.has_chat_template:
        thinking = examples.of_rows("thinking")[first].astype(bool)
        form = PromptFormat(thinking=bool(thinking.mean() > 0.5) if len(thinking) else False)
        others = int((thinking != form.thinking).sum())
        asked = "with thoughts" if form.thinking else "without thoughts"
    else:
        names = np.array([name if name in RAW_FORMS else "completion" for name in KIND_NAMES])
        kinds = examples.of_rows("kind")[first]
        forms = names[kinds[kinds != KIND_NAMES.index("text")]]
        found, counts = np.unique(forms, return_counts=True)
        form = PromptFormat.read({"form": str(found[np.argmax(counts)])} if len(found) else {})
        others = int((forms != form.form).sum())
        asked = f"as {form.form} rows"
    if not others:
        return form, None
    return (
        form,
        f"{others:,} rows are asked otherwise than the others; generate and chat will ask {asked}",
    )
