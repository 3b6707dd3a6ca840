"""What a script says without the packages it needs."""

import subprocess
import sys

import pytest

from .processes import EXPERIMENTS


@pytest.mark.parametrize("script", ["diagnose_llm", "train_lm", "llm_placement"])
def test_without_the_extra_the_error_says_what_to_install(script):
    blocked = f"import sys; sys.modules['tokenizers'] = None; sys.path.insert(0, {str(EXPERIMENTS)!r}); import {script}"
    ended = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert "pip install 'flatjax[experiments,llm]'" in ended.stderr.splitlines()[-1]
