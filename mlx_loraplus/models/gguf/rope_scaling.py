"""RoPE scaling in GGUF files: the hub's ``rope_scaling`` to metadata and tensors, and back.

Sources: ``set_gguf_parameters`` and ``generate_extra_tensors`` of llama.cpp's
convert_hf_to_gguf.py; ``rope_yarn`` of ggml.
"""

import math
from itertools import product
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from .reader import GGUFFile

LLAMA3_TENSOR = "rope_freqs.weight"
SHORT_TENSOR, LONG_TENSOR = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (LLAMA3_TENSOR, SHORT_TENSOR, LONG_TENSOR)
"""The tensors that hold a scaling instead of a weight."""

_NOT_ROTATED = 1e30  # a divisor of a frequency that stands for infinity

_YARN_EXTRAS = {"mscale", "mscale_all_dim"}
"""Settings of YaRN that only DeepSeek's models use."""

_FACTORS = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
"""Factors that are 1 in all but unusual files."""


def rope_kind(config: dict[str, Any]) -> str | None:
    """Return the name of a config's RoPE scaling, or None if it has no scaling."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return None
    return "longrope" if kind == "su" else kind


def rope_problem(config: dict[str, Any], allowed: tuple[str, ...]) -> str | None:
    """Return the reason why llama.cpp can't express a config's RoPE scaling, or None."""
    kind = rope_kind(config)
    if kind is None:
        return None
    if kind not in allowed:
        return f"RoPE scaling {kind!r}"

    extras = sorted(_YARN_EXTRAS & set(config["rope_scaling"]))
    if kind == "yarn" and extras:
        return f"RoPE scaling 'yarn' with {', '.join(extras)}"
    return None


def add_rope_scaling(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add a config's RoPE scaling to the metadata; the tensors are added separately."""
    kind, scaling = rope_kind(config), config.get("rope_scaling") or {}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])

    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 4096))
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))

    if kind == "longrope":
        original = _original_context(config)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_long_factor(config, original))


def rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors that llama.cpp stores for a config's RoPE scaling, by name."""
    kind, scaling = rope_kind(config), config.get("rope_scaling") or {}
    if kind == "llama3":
        divisors = llama3_divisors(config["head_dim"], config["rope_theta"], scaling)
        return {LLAMA3_TENSOR: divisors.astype(np.float32)}
    if kind == "proportional":
        rotated = scaling.get("partial_rotary_factor", 1.0)
        return {LLAMA3_TENSOR: proportional_divisors(config["global_head_dim"], rotated)}
    if kind == "longrope":
        return {
            LONG_TENSOR: np.array(scaling["long_factor"], np.float32),
            SHORT_TENSOR: np.array(scaling["short_factor"], np.float32),
        }
    return {}


def _original_context(config: dict[str, Any]) -> int:
    scaling = config["rope_scaling"]
    inside = scaling.get("original_max_position_embeddings")
    return config.get("original_max_position_embeddings") or inside or 4096


def read_rope_scaling(
    file: GGUFFile, architecture: str, config: dict[str, Any], allowed: tuple[str, ...]
) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a file's RoPE scaling, and a problem with it, if any.

    The llama3 rule is not stored by name. It is recognized by its divisors, which are stored as
    ``rope_freqs.weight``. LongRoPE is recognized by its tensors, too.

    Args:
        file: The file.
        architecture: llama.cpp's name of the architecture.
        config: The config with its numbers.
        allowed: The kinds that the architecture supports.
    """

    def number(name: str, default: float) -> float:
        found = file.metadata.get(f"{architecture}.rope.scaling.{name}", default)
        is_number = isinstance(found, int | float) and 0 < found < 1e9
        return float(found) if is_number else math.nan

    original = number("original_context_length", 4096)
    if problem := _attention_problem(file, architecture, config, original):
        return {}, problem

    # Old files have a factor without a type, or under another key; llama.cpp reads it as linear.
    raw = file.metadata.get(f"{architecture}.rope.scale_linear", 1.0)
    raw = file.metadata.get(f"{architecture}.rope.scaling.factor", raw)
    default = "none" if raw == 1 else "linear"
    stored = file.metadata.get(f"{architecture}.rope.scaling.type", default)

    # Scaling that is stored in tensors.
    if SHORT_TENSOR in file.tensors and LONG_TENSOR in file.tensors and "longrope" in allowed:
        scaling: dict[str, Any] = {"type": "longrope", "rope_type": "longrope"}
        for name, tensor in (("short_factor", SHORT_TENSOR), ("long_factor", LONG_TENSOR)):
            scaling[name] = file.read(tensor).reshape(-1).tolist()
        return {"rope_scaling": scaling, "original_max_position_embeddings": int(original)}, None
    if LLAMA3_TENSOR in file.tensors and stored == "none":
        return _llama3_rule(file, config, allowed)

    # Scaling that is stored in the metadata.
    kinds = ("none", *(kind for kind in allowed if kind in ("linear", "yarn")))
    factor = number("factor", raw)
    if stored not in kinds or math.isnan(factor) or LLAMA3_TENSOR in file.tensors:
        return {}, f"its RoPE scaling is {stored!r:.40} by {raw!r:.40}, allowed are {_and(kinds)}"
    if stored == "none" or factor == 1:
        return {"rope_scaling": None}, None

    scaling = {"rope_type": stored, "factor": factor}
    if stored == "yarn":
        scaling |= {"type": "yarn", "original_max_position_embeddings": int(original)}
        scaling["beta_fast"] = number("yarn_beta_fast", 32.0)
        scaling["beta_slow"] = number("yarn_beta_slow", 1.0)
    return {"rope_scaling": scaling}, None


def _attention_problem(
    file: GGUFFile, architecture: str, config: dict[str, Any], original: float
) -> str | None:
    """Return a problem with a factor of rotated vectors that mlx-lm does not apply."""
    if math.isnan(original):
        return "its rope.scaling.original_context_length is not a positive number"

    prefix = f"{architecture}.rope.scaling."
    expected = {f"{prefix}{name}": 1.0 for name in _FACTORS}
    if LONG_TENSOR in file.tensors:
        expected[f"{prefix}attn_factor"] = _long_factor(config, original)

    for key, value in expected.items():
        found = file.metadata.get(key, value)
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=1e-3):
            return f"its {key} is {found!r:.40}, but mlx-lm always uses {value:.6g}"
    return None


def _long_factor(config: dict[str, Any], original: float) -> float:
    """Return the factor of LongRoPE for rotated vectors, given the original context length."""
    factor = config["max_position_embeddings"] / max(original, 2)
    return math.sqrt(1 + math.log(factor) / math.log(max(original, 2))) if factor > 1 else 1.0


def _and(kinds: tuple[str, ...]) -> str:
    """Return names as a list in a sentence."""
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def _llama3_rule(
    file: GGUFFile, config: dict[str, Any], allowed: tuple[str, ...]
) -> tuple[dict[str, Any], str | None]:
    """Return the llama3 rule whose divisors a file stores, or a problem with them."""
    # Try the original context lengths and the limits of the known models (Llama 4's are equal).
    divisors = file.read(LLAMA3_TENSOR).reshape(-1)
    choices = product((4.0, 1.0), (8192, 4096, 16384, 32768)) if "llama3" in allowed else ()
    for high, original in choices:
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        expected = llama3_divisors(config["head_dim"], config["rope_theta"], scaling)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-3):
            return {"rope_scaling": scaling}, None
    return {}, f"its RoPE frequencies ({LLAMA3_TENSOR}) follow no rule that mlx-lm knows"


def llama3_divisors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Return the divisors of Llama 3.1's rotary frequencies, (head_dim / 2,).

    The divisor is 1 for short wavelengths and ``factor`` for long ones, with a smooth transition
    between them. Sources: ``Llama3RoPE`` of mlx-lm, and Meta's ``apply_scaling``.

    Args:
        head_dim: The size of a head.
        theta: The base of the frequencies.
        scaling: The ``rope_scaling`` of a config.
    """
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # positions per turn
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    if high == low:  # no transition
        return np.where(turns > low, 1.0, scaling["factor"])
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def proportional_divisors(head_dim: int, rotated: float) -> np.ndarray:
    """Return the divisors of Gemma 4's rotary frequencies in its full attention, (head_dim / 2,).

    Source: ``generate_extra_tensors`` of ``Gemma4Model`` in llama.cpp's converter.

    Args:
        head_dim: The size of a head.
        rotated: The fraction of the head that is rotated; the rest has divisors of 1e30.
    """
    count = int(head_dim * rotated) // 2
    return np.array([1.0] * count + [_NOT_ROTATED] * (head_dim // 2 - count), np.float32)
