"""How known inputs are changed: bytes anywhere, values of JSON, the header and tensors of safetensors."""

import contextlib
import json
import math
import random
import re
import struct
from typing import Any

import numpy as np

EDGES = [
    0,
    1,
    2,
    7,
    8,
    31,
    63,
    64,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
]
WORDS = [
    b"../../../etc/passwd", b"/etc/passwd", b"..", b"\x00", b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"true",
    b"[]", b"{}", b'""', b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"\n- ", b"1:1:1:1",
    b"!!python/object:os.system ls", b"&a [*a, *a]", b"*a", b"F64", b"I8", b"BF16", b"lora_a", b"dora", b"__metadata__",
]  # fmt: skip


def mutate(content: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Change a few things: numbers, ranges, words, or JSON values and the length before a safetensors header."""
    if content[:1] in (b"{", b"[") and chance.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(mutate_value(json.loads(content), chance)).encode(
                errors="surrogatepass"
            )
    if len(content) > 8 and content[8:9] == b"{" and chance.random() < 0.5:
        return mutate_header(content, chance)
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        reach = (
            len(changed) if chance.random() < 0.3 else min(len(changed), 2048)
        )  # the header is where it is decided
        at = chance.randrange(reach + 1)
        kind = chance.randrange(7)
        if kind == 0:
            width = chance.choice((1, 2, 4, 8))
            value = chance.choice(EDGES) if chance.random() < 0.7 else chance.getrandbits(64)
            changed[at : at + width] = (value % (1 << 8 * width)).to_bytes(
                width, chance.choice(("little", "big"))
            )
        elif kind == 1:
            del changed[at : at + chance.choice((1, 2, 8, 100, len(changed)))]
        elif kind == 2:
            changed[at:at] = changed[at : at + chance.choice((1, 8, 50, 500))]
        elif kind == 3:
            word = chance.choice(WORDS)
            changed[at : at + chance.choice((0, len(word)))] = word
        elif kind == 4:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[at : at + chance.choice((0, 64))] = other[
                start : start + chance.choice((8, 64, 512))
            ]
        elif kind == 5 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
        elif numbers := list(re.finditer(rb"-?\d+(\.\d+)?", bytes(changed[:4096]))):
            found = chance.choice(numbers)
            changed[found.start() : found.end()] = str(
                chance.choice([*EDGES, -1, -(2**63), 0.5, 1e308])
            ).encode()
    return bytes(changed)


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Change something in a JSON value, at any depth."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if chance.random() < 0.1:
            return value | {chance.choice(WORDS).decode(errors="replace"): value[key]}
        return value | {key: mutate_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [
            *value[:at],
            *([mutate_value(value[at], chance)] * chance.choice((0, 1, 1, 1, 2))),
            *value[at + 1 :],
        ]
    edges: list[Any] = [
        *EDGES,
        -1,
        -(2**63),
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        True,
        None,
        [],
        {},
        "",
        [[[]]],
    ]
    return chance.choice(
        [*edges, *(word.decode(errors="replace") for word in WORDS[:12]), "x" * 10_000]
    )


def mutate_header(content: bytes, chance: random.Random) -> bytes:
    """Change a value in a safetensors header, whose length then often still fits."""
    length = struct.unpack("<Q", content[:8])[0]
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return content[: chance.randrange(len(content))]
    data = content[8 + length :]
    tensors = (
        [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    )
    if (
        tensors
        and all(isinstance(header[name], dict) for name in tensors)
        and chance.random() < 0.7
    ):
        header, data = mutate_tensor(header, data, chance.choice(tensors), chance)
    else:
        header = mutate_value(header, chance)
    changed = json.dumps(header).encode(errors="surrogatepass")
    said = len(changed) if chance.random() < 0.9 else chance.choice(EDGES)
    return (
        struct.pack("<Q", said)
        + changed
        + (data if chance.random() < 0.9 else data[: chance.randrange(len(data) + 1)])
    )


def mutate_tensor(
    header: dict, data: bytes, name: str, chance: random.Random
) -> tuple[dict, bytes]:
    """Change one tensor of a safetensors file so that its header stays well-formed, and return header and data."""
    tensor, kind = dict(header[name]), chance.randrange(6)
    shape = list(tensor.get("shape") or [1])
    if kind == 0:
        tensor["shape"] = chance.choice(
            (shape[::-1], [*shape, 1], [1, *shape], shape[1:], [math.prod(shape)])
        )
    elif kind == 1:
        tensor["dtype"] = chance.choice(
            ("F32", "I32", "U32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8")
        )
    elif kind == 2:
        parts = name.split(".")
        parts[chance.randrange(len(parts))] = chance.choice(
            ("lora_a", "lora_b", "0", "-1", "..", "", "x" * 300, "weight")
        )
        return {
            (".".join(parts) if other == name else other): value for other, value in header.items()
        }, data
    elif kind == 3:
        return {other: value for other, value in header.items() if other != name}, data
    elif kind == 4:
        empty = {
            "dtype": "F32",
            "shape": [0, chance.choice(EDGES)],
            "data_offsets": [len(data), len(data)],
        }
        return header | {chance.choice((name, "model.layers.0.x.lora_a", "y")): empty}, data
    else:
        tensor["data_offsets"] = [len(data), len(data) + 4 * math.prod(shape)]
        extra = np.full(
            math.prod(shape), chance.choice((np.nan, np.inf, 1e38, 0)), np.float32
        ).tobytes()
        return header | {chance.choice(("y.lora_a", f"{name}x")): tensor}, data + extra
    return header | {name: tensor}, data
