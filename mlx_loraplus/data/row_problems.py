"""The problems and notes of a table's rows, collected while the rows are read."""

import json
import re
from dataclasses import dataclass, field

from ..files import LFS_ADVICE, is_lfs_pointer
from .messages import BadRowError, MissingFieldsError

MOST_KEPT = 100
"""Maximum number of problems, and of different notes, that are kept for each table."""

AS_PYTHON = (
    "a dict as Python prints it: write each row with json.dumps, or convert the printed text with"
    " json.dumps(ast.literal_eval(TEXT))"
)
"""What is wrong with a row in Python's notation, and what to do about it."""

_PYTHON_DICT = re.compile(r"\s*\{\s*'")


@dataclass
class RowProblems:
    """The bad rows of a table and the notes on its good rows, with line numbers in its file."""

    bad: int = 0  # number of bad rows
    # line and problem of each of the first bad rows
    problems: list[tuple[int, str]] = field(default_factory=list)
    lacks_fields: bool = False  # whether one of these rows lacks fields
    # for each note, the number of rows that have it, and the line of the first one
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_problem(self, line: int, problem: BadRowError) -> None:
        """Count a bad row, and keep its problem if it is one of the first ``MOST_KEPT``."""
        self.bad += 1
        if len(self.problems) < MOST_KEPT:
            self.problems.append((line, str(problem)))
            self.lacks_fields |= isinstance(problem, MissingFieldsError)

    def places(self, name: str) -> list[str]:
        """Return the first problems, each with its line in the file ``name``."""
        return [f"{name}:{line}: {problem}" for line, problem in self.problems]

    def add_note(self, line: int, note: str) -> None:
        """Count a row that has a note; after ``MOST_KEPT`` different notes, ignore new ones."""
        if note in self.notes or len(self.notes) < MOST_KEPT:
            count, first = self.notes.get(note, (0, line))
            self.notes[note] = (count + 1, first)


def is_python_dict(text: str) -> bool:
    """Return whether a text begins with a dict as Python prints it, with single quotes."""
    return _PYTHON_DICT.match(text) is not None


def explain_line(line: bytes, error: json.JSONDecodeError) -> BadRowError:
    """Return why a line is not JSON, and what to do in the likely cases."""
    if is_lfs_pointer(line):
        return BadRowError(f"the file is {LFS_ADVICE}")

    if is_python_dict(error.doc):
        return MissingFieldsError(f"not JSON, but {AS_PYTHON}")

    details = f"({error.msg.removesuffix(' at')} at column {error.colno})"
    if line.strip().startswith(b"[{"):
        details += (
            ": if the file is one JSON array, name it .json; otherwise write each row on one line"
        )
    elif line.strip() == b"{":
        details = "(a row over several lines): write each row on one line"
    elif line.strip().endswith(b"},"):
        details = "(a comma after the row): remove the commas between rows"
    elif line.startswith(b"{") and not line.rstrip().endswith(b"}"):
        details += ": the row is cut off; complete it, or remove it"
    return MissingFieldsError(f"not JSON {details}")
