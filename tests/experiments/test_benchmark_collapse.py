"""What is timed of neural collapse is what it is called."""

import json

import jax
import numpy as np
import pytest

import benchmark_collapse
from benchmark_collapse import Updating, batch, filled


def test_an_updated_batch_counts_its_samples_each_time():
    feats, labels = batch(num_classes=11, num_features=3, num_tokens=20, seed=0)
    updating = Updating(11, 3, feats, labels)
    updating()
    moments = updating()
    np.testing.assert_array_equal(moments.counts, 2 * np.bincount(labels, minlength=11))


def test_filled_moments_have_two_samples_a_class():
    moments = filled(num_classes=5000, num_features=2, seed=0)
    np.testing.assert_array_equal(moments.counts, np.full(5000, 2))
    assert np.all(np.asarray(moments.variances) > 0)


def test_one_hot_products_are_sums_by_classes():
    pytest.importorskip("torch")
    feats, labels = batch(num_classes=7, num_features=3, num_tokens=20, seed=0)
    counts, sums = benchmark_collapse.one_hot_update(np.asarray(feats), np.asarray(labels), 7)()
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=7))
    np.testing.assert_allclose(sums, jax.ops.segment_sum(feats, labels, 7), rtol=1e-5)


def test_the_table_and_the_record(tmp_path, capsys):
    benchmark_collapse.vocabulary(num_classes=30, num_features=4, num_tokens=8, seconds=0, folder=tmp_path)
    assert "temporary memory" in capsys.readouterr().out
    rows = json.loads((tmp_path / "collapse_vocabulary.json").read_text())["rows"]
    assert {"segment_sum", "update, in place", "update, into a copy", "CDNV"} <= {row.get("function") for row in rows}
    assert rows[-1]["cdnv_flops"] > 0
