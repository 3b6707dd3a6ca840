"""κ at equal training loss."""

import json

import jax
import numpy as np
import pytest

import steering


def test_kappa_at_a_loss_lies_on_the_line_between_the_steps_around_it():
    loss = np.geomspace(2, 1e-3, 50)
    kappa = 3 * loss**0.7
    for level in (1.0, 0.1, 0.0123):
        np.testing.assert_allclose(steering.at_loss(loss, kappa, level), 3 * level**0.7, rtol=1e-12)
    assert np.isnan(steering.at_loss(loss, kappa, 1e-4))
    assert np.isnan(steering.at_loss(loss, kappa, 3.0))


def test_the_table_and_the_figure(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        steering.main(strengths=(-1e-3, 0.0, 0.1), num_seeds=2, num_steps=150, num_train=100, folder=tmp_path)
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    at = {(row["strength"], row["loss"]): row.get("ratio") for row in rows}
    assert at[0.0, 0.3] == 1
    assert at[0.1, 0.3] < 1 < at[-1e-3, 0.3]
    assert "not by all" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_strength_of_zero_is_needed():
    with pytest.raises(SystemExit, match="wanted 0 among them"):
        steering.main(strengths=(0.1,))
