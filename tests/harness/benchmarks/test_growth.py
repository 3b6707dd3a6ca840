"""Growth is a power law, drawn."""

import numpy as np

from harness.benchmarks.growth import Growth, draw_growth, exponent


def test_the_exponent_of_a_power_law_and_its_standard_error():
    sizes = [10, 100, 1000]
    np.testing.assert_allclose(exponent(sizes, [3 * n**1.5 for n in sizes]), (1.5, 0), atol=1e-12)
    # Of log10 cost 0, 1, 3 at log10 size 1, 2, 3: the slope is 3/2, residuals 1/6, −1/3, 1/6.
    np.testing.assert_allclose(exponent(sizes, [1, 10, 1000]), (1.5, np.sqrt(1 / 6 / 2)), rtol=1e-12)
    np.testing.assert_allclose(exponent([10, 100], [1, 10]), (1, np.nan))


def test_growth_is_drawn(tmp_path):
    growth = Growth("n", "seconds", [1, 10], {"ours": [1.0, 2.0]})
    draw_growth(tmp_path / "growth.png", [growth, growth], "title")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
