"""What a script says without the packages it needs."""

import subprocess
import sys

from .processes import EXPERIMENTS

SCRIPTS = ("diagnose_llm", "train_lm", "llm_placement")


def test_without_the_extra_the_error_says_what_to_install():
    program = f"""
import importlib, sys
sys.modules["tokenizers"] = None
sys.path.insert(0, {str(EXPERIMENTS)!r})
for script in {SCRIPTS}:
    try:
        importlib.import_module(script)
    except (Exception, SystemExit) as error:
        print(script, error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = ended.stdout.splitlines()
    assert len(said) == len(SCRIPTS), ended
    for script, line in zip(SCRIPTS, said, strict=True):
        assert line.startswith(script)
        assert "pip install 'flatjax[experiments,llm]'" in line
