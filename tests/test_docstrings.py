"""Every docstring of the package and of the experiments can be read without the code that it describes."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMPLETING_WORDS = {"of", "by", "with", "that", "to", "as", "at", "and"}
FEWEST_WORDS = 4


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """The line, the owner's name and the text of each docstring; what stands below an attribute is one too."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        owner = getattr(node, "name", "module")
        for place, statement in enumerate(node.body):
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                continue
            text = statement.value.value
            if isinstance(text, str):
                name = owner if place == 0 else f"{owner}, below {ast.unparse(node.body[place - 1])[:40]!r}"
                yield statement.lineno, name, text


def fault(text: str) -> str | None:
    words = text.split()
    if len(words) < FEWEST_WORDS:
        return f"has {len(words)} words, wanted at least {FEWEST_WORDS}"
    first = words[0].strip(".,:;`").lower()
    return f"begins with {words[0]!r}, which only completes a name" if first in COMPLETING_WORDS else None


@pytest.mark.parametrize("folder", ["flatjax", "experiments"])
def test_docstrings_say_something_by_themselves(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [(path, *each) for path in files for each in docstrings(ast.parse(path.read_text()))]
    faults = [
        f"{path.relative_to(ROOT)}:{line} {name} {reason}: {text.split(chr(10))[0]!r}"
        for path, line, name, text in found
        if (reason := fault(text))
    ]
    assert not faults, f"{len(faults)} of {len(found)} docstrings:\n" + "\n".join(faults)


def test_the_floor_finds_what_completes_a_name():
    source = '''
"""Numbers to add up here."""
LIMIT = 3
"""Of the numbers that are added."""
class Sum:
    total: int
    """The total."""
    def add(self):
        """To the end."""
        def step():
            """And then one more."""
'''
    texts = {text: fault(text) for _, _, text in docstrings(ast.parse(source))}
    assert [text for text, reason in texts.items() if reason is None] == ["Numbers to add up here."]
    assert len(texts) == 5
