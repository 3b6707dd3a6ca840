"""Sums over pairs in tiles are those of the dense matrix of pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax.collapse.pairs import sum_over_distances, sum_over_products
from flatjax.core import distances

M = 5


def problem(num_rows, dtype="float64"):
    rng = np.random.default_rng(num_rows)
    use = rng.random(num_rows) < 0.9
    use[-1] = True
    return rng.normal(size=(num_rows, M)).astype(dtype), rng.uniform(1, 2, num_rows).astype(dtype), use


def inverse_distance(distances, v, other):
    return (v[:, None] + other[None, :]) / distances


def cosine_and_square(products, *_):
    return products, products**2


def dense(rows, v, use):
    rows, v = rows[use].astype(float), v[use].astype(float)
    i, j = np.triu_indices(len(rows), 1)
    products = np.sum(rows[i] * rows[j], axis=1)
    return np.sum((v[i] + v[j]) / np.sum((rows[i] - rows[j]) ** 2, axis=1)), np.sum(products), np.sum(products**2)


@functools.partial(jax.jit, static_argnames=("tile_size", "axis_names"))
def sums(rows, v, use, tile_size=None, axis_names=()):
    how = {"tile_size": tile_size, "axis_names": axis_names}
    products = sum_over_products(cosine_and_square, rows, (), use, **how)
    return sum_over_distances(inverse_distance, rows, v, use, **how), *products


@pytest.mark.parametrize(
    ("num_rows", "tile_size"),
    [(1, 1), (2, 1), (2, None), (13, 4), (12, 4), (13, 3), (13, 12), (13, 99), (301, 150)],
)
def test_every_pair_is_counted_once_however_the_rows_fall_into_tiles(num_rows, tile_size):
    rows, v, use = problem(num_rows)
    np.testing.assert_allclose(sums(rows, v, use, tile_size), dense(rows, v, use), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("num_rows", "how"),
    # Three, five and one row a device, in tiles of two.
    [*((24, how) for how in ("Auto", "Explicit", "shard_map")), (40, "Auto"), (40, "shard_map"), (8, "Explicit")],
)
def test_pairs_of_rows_split_among_devices_are_those_of_all_rows(num_rows, how):
    rows, v, use = problem(num_rows)
    axis_type = AxisType.Explicit if how == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
    placed = jax.device_put((rows, v, use), NamedSharding(mesh, P("rows")))
    compute = functools.partial(sums, tile_size=2)
    if how == "Explicit":
        compute = jax.sharding.auto_axes(compute, out_sharding=P())
    if how == "shard_map":
        compute = functools.partial(sums, tile_size=2, axis_names=("rows",))
        compute = jax.shard_map(compute, mesh=mesh, in_specs=P("rows"), out_specs=P())
    with jax.set_mesh(mesh):
        compiled = jax.jit(compute).lower(*placed).compile()
        actual = compiled(*placed)
    np.testing.assert_allclose(actual, dense(rows, v, use), rtol=1e-12, atol=1e-11)
    # Parts go around in a ring: no device ever holds all rows.
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("num_devices", [2, 3, 5])
def test_a_ring_of_any_length_meets_every_pair_once(num_devices):
    rows, v, use = problem(6 * num_devices)
    mesh = jax.make_mesh((num_devices,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    compute = functools.partial(sums, axis_names=("rows",))
    actual = jax.jit(jax.shard_map(compute, mesh=mesh, in_specs=P("rows"), out_specs=P()))(rows, v, use)
    np.testing.assert_allclose(actual, dense(rows, v, use), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5], ids=str)
def test_close_rows_are_told_apart_in_float32_in_tiles_of_many(distance):
    rows, v, _ = problem(300, "float32")
    # Pairs in one tile and in two, and more of them than are refined at once.
    rows[150:] = rows[:150] + np.float32(distance) * rows[::-1][:150]
    use = np.ones(300, bool)
    assert distances.FEW < 150
    np.testing.assert_allclose(sums(rows, v, use, 150)[0], dense(rows, v, use)[0], rtol=2e-6)


def test_more_close_pairs_than_are_refined_at_once_are_refined_all():
    rows, v, _ = problem(300, "float32")
    rows = np.float32(1) + np.float32(1e-4) * rows
    use = np.ones(300, bool)
    assert distances._CLOSE_AT_ONCE < 150 * 149 / 2
    np.testing.assert_allclose(sums(rows, v, use, 150)[0], dense(rows, v, use)[0], rtol=1e-5)


@pytest.mark.parametrize(("num_rows", "tile_size"), [(13, 4), (300, 150)])
def test_gradients_are_those_of_the_dense_sum(num_rows, tile_size):
    rows, v, use = problem(num_rows)

    def total(rows, v):
        distances = jnp.sum((rows[:, None] - rows[None, :]) ** 2, axis=2)
        pairs = np.triu(use[:, None] & use[None, :], 1)
        of_distances = jnp.where(pairs, (v[:, None] + v[None, :]) / jnp.where(pairs, distances, 1), 0)
        return jnp.sum(of_distances) + jnp.sum(jnp.where(pairs, (rows @ rows.T) ** 2, 0))

    def tiled(rows, v):
        of_distances, _, of_products = sums(rows, v, use, tile_size)
        return of_distances + of_products

    for actual, wanted in zip(*(jax.jit(jax.grad(f, (0, 1)))(rows, v) for f in (tiled, total)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-9 * np.max(np.abs(wanted)))
    along = jnp.asarray(np.random.default_rng(0).normal(size=rows.shape))
    forward = (jax.jit(lambda f=f: jax.jvp(lambda rows: f(rows, v), (rows,), (along,))[1])() for f in (tiled, total))
    np.testing.assert_allclose(*forward, rtol=1e-9)


def test_memory_does_not_grow_with_the_number_of_pairs():
    def temporary(num_rows):
        shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((num_rows, M), "f4"), ((num_rows,), "f4")))
        use = jax.ShapeDtypeStruct((num_rows,), bool)
        return sums.lower(*shapes, use).compile().memory_analysis().temp_size_in_bytes

    assert temporary(40_000) < temporary(5_000) + 3 * 4 * 35_000 * M
