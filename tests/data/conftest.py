import mlx_loraplus  # noqa: F401, I001 (before MLX, which then finds the fast BLAS)

from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_loraplus.models.find_model import find_model

TEMPLATES = Path(__file__).parent / "templates"
LetterTokenizer = Callable[..., TokenizerWrapper]


@pytest.fixture(scope="session")
def gemma() -> TokenizerWrapper:
    """Gemma 3's tokenizer: SentencePiece, BOS in front, no chat template (a base model)."""
    return load_tokenizer(find_model("gemma-3-270m").path)


@pytest.fixture(scope="session")
def smollm2() -> TokenizerWrapper:
    """SmolLM2's tokenizer: byte-level BPE, no BOS in front, ChatML with a default system message."""
    return load_tokenizer(find_model("smollm2-135m").path)


def make_letters(
    template: str | None = None, special: str = "", bos: str = "<s>", ends: str = "</s>"
):
    """Return a tokenizer whose tokens are single letters and the special ones that are named, apart by blanks.

    The first of ``ends`` is the end-of-sequence token; all of them end generation.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [*dict.fromkeys((bos, *ends.split(), *special.split()))]
    backend.add_special_tokens(names)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=ends.split()[0]
    )
    if template is not None:
        fast.chat_template = (
            (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").removesuffix("\n")
        )
    return TokenizerWrapper(fast, eos_token_ids=[backend.token_to_id(end) for end in ends.split()])


@pytest.fixture(scope="session")
def letters() -> LetterTokenizer:
    """Make a tokenizer of single letters: ``letters("chatml", special="<|im_start|>", ends="<|im_end|>")``."""
    return make_letters


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where encoded rows are kept: an empty folder, so that no test reads what older code has encoded."""
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"
