"""Every test runs on 8 virtual CPU devices, with float64 at hand and nothing promoted in silence."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 "  # a third less time: most tests compile much and compute little
    # Half of what is left; `helpers.jit_as_usual` compiles with them. Newer releases refuse a flag they do not know.
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else "")
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the oracles' matrices are small, and idle BLAS threads spin

import jax
import pytest

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
