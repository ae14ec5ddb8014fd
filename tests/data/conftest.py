import mlx_loraplus  # noqa: F401, I001 (before MLX, which then finds the fast BLAS)

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.models.names import find_model


@pytest.fixture(scope="session")
def gemma() -> TokenizerWrapper:
    """Gemma 3's tokenizer: SentencePiece, BOS in front, no chat template (a base model)."""
    return load_tokenizer(find_model("gemma-3-270m").path)


@pytest.fixture(scope="session")
def smollm2() -> TokenizerWrapper:
    """SmolLM2's tokenizer: byte-level BPE, no BOS in front, ChatML with a default system message."""
    return load_tokenizer(find_model("smollm2-135m").path)
