"""What is true of all messages of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlx_loraplus
from mlx_loraplus.errors import counted

PACKAGE = Path(mlx_loraplus.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def strings_of(tree: ast.Module) -> Iterator[ast.Constant | ast.JoinedStr]:
    """Yield the strings of a module, except docstrings and the parts of f-strings."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            left_out.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (is_text or isinstance(node, ast.JoinedStr)) and id(node) not in left_out:
            yield node  # pyright: ignore[reportReturnType]


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    """Return a string with "…" for each value that is filled in, and "… rows" for counted rows."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(filled_in, node.values))


def filled_in(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    value = part.value if isinstance(part, ast.FormattedValue) else part
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "counted":
        noun = value.args[1]
        return f"… {text_of(noun) if isinstance(noun, ast.Constant | ast.JoinedStr) else '…'}s"
    return "…"


def messages_of_package() -> list[str]:
    """Return all strings of the package that may be messages or parts of them."""
    return [text_of(node) for tree in TREES.values() for node in strings_of(tree)]


# --- numbers ---

NOUNS = (
    "rows|examples|steps|values|runs|trials|layers|blocks|tensors|columns|prompts|answers|batches"
    "|minutes|scores|heads|embeddings|dimensions|pairs|experts|seeds|checkpoints|files|processes"
    "|lines|names|modules|chats|arrays|weights|parameters|strings"
)
NUMBER_BEFORE = re.compile(rf"^ (?:(?!in |of |needs |holds )\w+ )?(?:{NOUNS})\b")
NOT_NUMBERS = {"role", "split", "folder", "row.kind", "form.form", "message['role']"}
"""Expressions whose values are words, as in "train rows"."""
AT_LEAST_TWO = {
    "adapters/trainable.py": {"self.total"},
    "tyro_errors.py": {"count"},
    "launching.py": {"processes", "len(processes)"},
    "adapters/tensor_parallel.py": {"processes"},
    "training/interrupts.py": {"most"},
    "training/optimizer.py": {"parameters[deep[0]].ndim"},
    "data/holdout.py": {"len(train)"},
    "data/csv_rows.py": {"len(values)"},
    "data/data_problems.py": {"count"},
    "data/model_limits.py": {"len(holders)"},
    "runs/verdict.py": {"wrong"},
    "runs/report_headline.py": {"count"},
}
"""Expressions whose values are larger than 1 where they are written."""


def uncounted(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the parts of f-strings that would read "1 rows", with the expression of the number."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            written = ast.unparse(value.value)
            form = ast.unparse(value.format_spec) if value.format_spec else ""
            is_constant = written.strip("_").isupper()
            has_digits = re.search(r"\.[1-9]f", form) is not None
            is_text = value.conversion != -1 or written in NOT_NUMBERS
            if is_constant or has_digits or is_text:
                continue
            if NUMBER_BEFORE.match(str(after.value)):
                yield f"{{{written}}}{after.value}", written


def test_one_is_followed_by_a_singular():
    assert counted(1, "row") == "1 row"
    assert counted(0, "row") == "0 rows"
    assert counted(1200, "row") == "1,200 rows"
    assert counted(2, "batch") == "2 batches"
    assert counted(2, "process") == "2 processes"


def test_numbers_of_things_are_written_by_counted():
    found = []
    for path, tree in TREES.items():
        known = AT_LEAST_TWO.get(path.relative_to(PACKAGE).as_posix(), set())
        found += [f"{path}: {part}" for part, value in uncounted(tree) if value not in known]
    assert found == []


# --- what is recommended ---


def test_no_message_or_setting_recommends_what_is_not_in_the_wheel():
    assert not [text for text in messages_of_package() if "scripts/" in text]
    settings = (PACKAGE.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert "`scripts/" not in settings
