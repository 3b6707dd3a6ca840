"""The README's Python examples run as a reader would run them: in a process of their own, with JAX's defaults."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readme_shows_nnx_linen_training_optimizers_layers_collapse_and_loading():
    modules = [re.search(r"from flax import (\w+)", example) for example in EXAMPLES]
    assert [found and found[1] for found in modules] == ["nnx", "linen", "nnx", "nnx", "nnx", None, None]
    assert "cross_entropy_and_flatness" in EXAMPLES[2]
    assert "flat_reg" in EXAMPLES[3]
    assert "flatness_profile" in EXAMPLES[4]
    assert "ClassMoments" in EXAMPLES[5]
    assert "load_decoder" in EXAMPLES[6]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["NNX", "Linen", "training", "optimizer", "layers", "collapse", "loading"]
)
def test_an_example_of_the_readme_prints_a_number(example):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-c", example]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"(κ|CDNV) \d+\.\d{3}", result.stdout)
