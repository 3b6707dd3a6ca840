"""The package says which it is and what is in it, and an editable install is found from the folder of the clone."""

import ast
import importlib
import inspect
import pkgutil
import re
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


def modules() -> list[str]:
    return ["flatjax", *(module.name for module in pkgutil.walk_packages(flatjax.__path__, "flatjax."))]


def test_every_module_is_imported_and_says_what_it_is():
    assert len(modules()) > 90
    for name in modules():
        assert ast.get_docstring(ast.parse(inspect.getsource(importlib.import_module(name)))), name


PUBLIC_FOLDERS = [
    module.name for module in pkgutil.iter_modules(flatjax.__path__) if module.ispkg and module.name != "core"
]


def test_the_map_of_the_package_names_every_folder_and_what_one_starts_with():
    assert PUBLIC_FOLDERS
    for folder in PUBLIC_FOLDERS:
        assert f"* `flatjax.{folder}`:" in flatjax.__doc__
    start, _ = flatjax.__doc__.split("The folders")
    named = re.findall(r"`(\w+)`", start)
    assert len(named) == 10 + 1  # with the record that one of them takes
    assert all(callable(getattr(flatjax, name)) for name in named)


def test_what_dir_lists_is_public():
    names = {name for name in dir(flatjax) if not name.startswith("__")} - {"jaxtyping"}  # which the tests import there
    folders = {name for name in names if inspect.ismodule(getattr(flatjax, name))}
    assert folders == set(PUBLIC_FOLDERS)
    others = [getattr(flatjax, name) for name in names - folders]
    assert all(inspect.isfunction(value) or inspect.isclass(value) for value in others)


@pytest.mark.parametrize("folder", PUBLIC_FOLDERS)
def test_a_folder_exports_its_public_names_and_each_by_its_own_name(folder):
    package = importlib.import_module(f"flatjax.{folder}")
    body = ast.parse(inspect.getsource(package)).body
    exports = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert exports
    assert all(alias.name == alias.asname for alias in exports)
    assert all(not inspect.ismodule(getattr(package, alias.name)) for alias in exports)


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
