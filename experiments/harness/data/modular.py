"""Split every equation `<x> <op> <y> = <x ∘ y>` mod p of modular arithmetic into seen and held-out ones."""

from typing import Literal, NamedTuple

import numpy as np

Operation = Literal["add", "subtract", "multiply", "divide", "quadratic"]
"""The operations are x + y, x − y, x · y, x / y (y ≠ 0) and x² + xy + y²."""

CONTEXT = 4
"""An equation's left side has these tokens: x, the operation, y, the equals sign."""


class Equations(NamedTuple):
    """Equations are left sides (n, 4) as tokens, and right sides (n,).

    Tokens 0 … p − 1 are numbers, p is the operation, and p + 1 the equals sign.
    """

    tokens: np.ndarray
    labels: np.ndarray


def vocab_size(modulus: int) -> int:
    return modulus + 2


def equations(operation: Operation, modulus: int) -> Equations:
    """Return all equations of the operation, in lexicographic order."""
    if modulus < 2 or (operation == "divide" and any(modulus % k == 0 for k in range(2, int(modulus**0.5) + 1))):
        raise ValueError(f"modulus is {modulus}, wanted 2 or more, and a prime for division")
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(modulus), np.arange(modulus), indexing="ij"))
    if operation == "divide":
        x, y = x[y != 0], y[y != 0]
    inverse = np.array([0] + [pow(k, -1, modulus) if operation == "divide" else 0 for k in range(1, modulus)])
    result = {
        "add": x + y,
        "subtract": x - y,
        "multiply": x * y,
        "divide": x * inverse[y],
        "quadratic": x**2 + x * y + y**2,
    }[operation]
    tokens = np.stack([x, np.full_like(x, modulus), y, np.full_like(x, modulus + 1)], axis=1)
    return Equations(tokens.astype(np.int32), (result % modulus).astype(np.int32))


def split(all_equations: Equations, train_share: float, seed: int) -> tuple[Equations, Equations]:
    """Split the equations into a random `train_share` and the others."""
    n = len(all_equations.labels)
    num_train = round(train_share * n)
    if not 2 <= num_train < n:
        raise ValueError(f"train_share is {train_share}: {num_train} of {n} equations, wanted at least 2 and not all")
    order = np.random.default_rng(seed).permutation(n)
    train, held_out = order[:num_train], order[num_train:]
    return Equations(*(part[train] for part in all_equations)), Equations(*(part[held_out] for part in all_equations))
