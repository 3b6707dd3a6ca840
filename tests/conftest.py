"""Every test runs on 8 virtual CPU devices, with float64 at hand and nothing promoted in silence."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 "  # a third less time: most tests compile much and compute little
    # Half of what is left; `helpers.jit_as_usual` compiles with the emitters. Splitting a program among threads costs
    # more than it saves where every core has a process of tests. Newer releases refuse a flag they do not know.
    + (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        if version("jaxlib").startswith("0.10.")
        else ""
    )
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests compile the same program. Each is compiled once for all processes of a run, or of all runs that are given
# a folder of yours.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flatjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the oracles' matrices are small, and idle BLAS threads spin

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Each maps memory in several pieces, of which a process may have 65,530: beyond them compilation crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


FAST = (
    "collapse/test_bad_input.py",
    "core/",
    "curvature/test_counts.py",
    "curvature/test_vectors.py",
    "flatness/test_inputs.py",
    "flatness/test_invariances.py",
    "flatness/test_relative.py",
    "harness/benchmarks/test_growth.py",
    "harness/data/",
    "harness/generalization_gap/",
    "harness/llm_placement/test_tables.py",
    "harness/results/",
    "layers/test_names.py",
    "layers/test_record.py",
    "loading/",
    "run/",
    "test_calls.py",
    "test_docstrings.py",
    "test_heads.py",
    "test_packaging.py",
    "test_signatures.py",
)
"""The definition, the invariances, every public function once, loading, and the small units of the experiments."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is not fast, the doctests too."""
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        if not path.startswith(FAST):
            item.add_marker(pytest.mark.slow)
