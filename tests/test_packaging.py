"""The package says which it is, and an editable install is found from the folder that holds the clone."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import flatjax

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "flatjax.__version__"}
    assert flatjax.__version__.count(".") == 2


def test_a_clone_beside_which_python_starts_does_not_hide_the_editable_install(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("builds need setuptools 77")
    clone, site = tmp_path / "flatjax", tmp_path / "site"
    (clone / "flatjax").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / "flatjax" / "__init__.py").write_text('__version__ = "1.2.3"\n')  # without what it depends on

    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("flatjax-1.2.3-*.whl")
    zipfile.ZipFile(wheel).extractall(site)

    found = f"import site; site.addsitedir({str(site)!r}); import flatjax; print(flatjax.__file__)"
    command = [sys.executable, "-S", "-c", found]  # without the install that the tests themselves run on
    result = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=True)
    assert Path(result.stdout.strip()) == clone / "flatjax" / "__init__.py"
