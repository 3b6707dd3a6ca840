"""The documents: their examples run as a reader would run them, and what they point at is there.

The examples of a document are one program, read from top to bottom, in a process of its own with JAX's defaults.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "flatjax/README.md",
    "flatjax/CHANGELOG.md",
    "experiments/README.md",
    "experiments/RESULTS.md",
    "experiments/BENCHMARKS.md",
    ".github/CONTRIBUTING.md",
)
WITH_EXAMPLES = ("README.md", "flatjax/README.md")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block: its first line, counted from 0, its language and what it holds."""

    line: int
    language: str
    text: str

    @property
    def missing(self) -> set[str]:
        """What it imports that is not installed: PyTorch and Equinox need not be."""
        lines = re.findall(r"^(?:from|import) (.+?)(?: import .*)?$", self.text, re.MULTILINE)
        modules = {name.split()[0].partition(".")[0] for line in lines for name in line.split(",")}
        return {module for module in modules if importlib.util.find_spec(module) is None}


def read(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str) -> list[Block]:
    text = read(document)
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, match.start(2)), match[1], match[2]) for match in found]


def examples(document: str) -> tuple[str, str]:
    """Its Python, at the lines where it stands, so that a traceback names them, and what it says is printed."""
    program = [""] * (read(document).count("\n") + 1)
    outputs = []
    runs = False
    for block in blocks(document):
        if block.language == "python":
            runs = not block.missing
            if runs:
                lines = block.text.splitlines()
                program[block.line : block.line + len(lines)] = lines
                outputs += [f"{said}\n" for said in re.findall(r"^print\(.*\)  # → (.+)$", block.text, re.MULTILINE)]
        elif block.language == "text" and runs:
            outputs.append(block.text)
    return "\n".join(program), "".join(outputs)


@pytest.mark.parametrize("document", WITH_EXAMPLES)
def test_the_examples_of_a_document_print_what_it_says(document, tmp_path):
    program, expected = examples(document)
    path = tmp_path / "examples.md"
    path.write_text(program)
    # On one device, as most readers have; little time is spent on compiling well.
    flags = (flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(path)]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert NUMBER.sub("#", result.stdout) == NUMBER.sub("#", expected), result.stdout
    printed, said = (np.array(NUMBER.findall(text), float) for text in (result.stdout, expected))
    np.testing.assert_allclose(printed, said, rtol=0.02, atol=0.002, err_msg=result.stdout)


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - set(WITH_EXAMPLES)))
def test_other_documents_have_no_examples_that_are_not_run(document):
    assert not [block for block in blocks(document) if block.language == "python"]


def test_the_examples_of_the_readme_show_what_a_newcomer_needs():
    program = "\n".join(block.text for block in blocks("README.md") if block.language == "python")
    for name in (
        "relative_flatness",
        "neural_collapse",
        "torch",
        "cross_entropy_and_flatness",
        "flat_reg",
        "flatness_profile",
        "ClassMoments",
    ):
        assert name in program
    guide = "\n".join(block.text for block in blocks("flatjax/README.md") if block.language == "python")
    assert "load_decoder" in guide


def test_the_guide_has_an_example_of_every_framework():
    program = "\n".join(block.text for block in blocks("flatjax/README.md") if block.language == "python")
    for module in ("from flax import nnx", "from flax import linen", "import equinox", "import torch"):
        assert module in program


def test_the_readme_is_short_and_has_its_two_commands():
    lines = read("README.md").splitlines()
    assert len(lines) <= 200
    commands = [block.text.strip() for block in blocks("README.md") if block.language == ""]
    assert commands == [
        "pip install -e '.[experiments]' && python experiments/grokking.py",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_are_there(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        if heading:
            assert heading in anchors(path.read_text()), f"{document} links to {target}"


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_that_a_document_names_are_there(document):
    for script in re.findall(r"\bexperiments/\w+\.py", read(document)):
        assert (ROOT / script).exists(), f"{document} names {script}"


def test_every_figure_is_in_the_results_or_the_timings():
    shown = read("experiments/RESULTS.md") + read("experiments/BENCHMARKS.md")
    for figure in (ROOT / "experiments" / "figures").glob("*.png"):
        assert f"](figures/{figure.name})" in shown


def test_every_experiment_is_in_the_index():
    for script in (ROOT / "experiments").glob("*.py"):
        assert script.name in read("experiments/README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_cells_of_tables_have_at_most_25_words(document):
    for row in re.findall(r"^\|.*\|$", read(document), re.MULTILINE):
        for cell in row.strip("|").split(" | "):
            assert len(cell.split()) <= 25, cell
