import numpy as np
import pytest

from harness.data import modular

OPERATIONS = {
    "add": lambda x, y, p: (x + y) % p,
    "subtract": lambda x, y, p: (x - y) % p,
    "multiply": lambda x, y, p: (x * y) % p,
    "quadratic": lambda x, y, p: (x * x + x * y + y * y) % p,
}


@pytest.mark.parametrize("modulus", [2, 7, 97])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_pair_of_numbers_is_an_equation_once(operation, modulus):
    tokens, labels = modular.equations(operation, modulus)
    assert {(x, y) for x, _, y, _ in tokens.tolist()} == {(x, y) for x in range(modulus) for y in range(modulus)}
    assert len(labels) == modulus**2
    assert np.all(tokens[:, 1] == modulus)
    assert np.all(tokens[:, 3] == modulus + 1)
    np.testing.assert_array_equal(labels, OPERATIONS[operation](tokens[:, 0], tokens[:, 2], modulus))


@pytest.mark.parametrize("modulus", [2, 7, 97])
def test_a_quotient_times_its_divisor_is_the_dividend(modulus):
    tokens, labels = modular.equations("divide", modulus)
    assert len(labels) == modulus * (modulus - 1)
    assert np.all(tokens[:, 2] != 0)
    np.testing.assert_array_equal(labels * tokens[:, 2] % modulus, tokens[:, 0])


@pytest.mark.parametrize("share", [0.2, 0.4, 0.9])
def test_a_split_is_a_partition_that_its_seed_alone_determines(share):
    everything = modular.equations("add", 11)
    train, held_out = modular.split(everything, share, seed=3)
    assert len(train.labels) == round(share * 121)
    rows = [tuple(row) for part in (train, held_out) for row in np.column_stack(part).tolist()]
    assert sorted(rows) == sorted(map(tuple, np.column_stack(everything).tolist()))
    np.testing.assert_array_equal(train.tokens, modular.split(everything, share, seed=3)[0].tokens)
    assert np.any(train.tokens != modular.split(everything, share, seed=4)[0].tokens)


@pytest.mark.parametrize(("operation", "modulus"), [("add", 1), ("divide", 9), ("divide", 1)])
def test_a_modulus_without_the_operation_is_an_error(operation, modulus):
    with pytest.raises(ValueError, match=f"modulus is {modulus}, wanted"):
        modular.equations(operation, modulus)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_a_split_that_leaves_nothing_on_a_side_is_an_error(share):
    with pytest.raises(ValueError, match="train_share is"):
        modular.split(modular.equations("add", 7), share, seed=0)
