"""A head and its samples split among devices: they give what one device gives, and send each other sums alone."""

import functools
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatjax
from flatjax.flatness.tiled.online_softmax import OnlineSoftmax, merged

AXES = {"data": 4, "model": 2}
DATA, MODEL, ALL = ("data",), ("model",), ("data", "model")
# Parts of 128 rows in tiles of 12, or in a shard_map of 128 rows or more in tiles of 96: the last tile is ragged.
V, M, N, TILE = 1024, 8, 16, 96
# Numbers that an online softmax leaves behind, or the rows of a frame by 8 samples and 11 rows: far fewer than a device
# holds of the kernel.
MERGED = max(N * (M + 3), 8 * (M + 4) + 11 * M)
MIXTURE = (1, -0.3, 0.5, 0.01)


class Case(NamedTuple):
    """Up to which order to differentiate what is split by the compiler, or by a `jax.shard_map` along `manual` axes."""

    order: int = 1
    rows: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    manual: tuple[str, ...] = ()
    layout: str = "kernel"
    axis_type: AxisType = AxisType.Auto
    num_outputs: int = V

    @property
    def num_values(self):
        """Loss and κ alone, or κ and κ̂ of their own functions too."""
        return 4 if self.order == 2 and not self.manual else 2

    @property
    def rows_held(self):
        return self.num_outputs // math.prod(AXES[name] for name in self.rows)

    @property
    def mesh(self):
        return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(self.axis_type,) * len(AXES))

    def specs(self, names):
        """Of the arguments and the results, as far as they are split along some axes."""
        rows, samples = (tuple(name for name in axes if name in names) or None for axes in (self.rows, self.samples))
        samples = PartitionSpec(samples)
        matrix = PartitionSpec(None, rows) if self.layout == "kernel" else PartitionSpec(rows)
        point = {self.layout: matrix, "bias": PartitionSpec(rows), "feats": samples}
        return (point, samples, point), (PartitionSpec(), point, point)[: 1 + self.order]


@functools.cache
def padded_problem(num_outputs=V):
    """One device of four has nothing but padding, another a little."""
    problem = helpers.random_problem(num_outputs, M, (N,))
    problem.labels[[0, 1, 8]] = 0, num_outputs - 1, 10**9
    problem.labels[4:8], problem.weights[8], problem.feats[[5, 8]] = -100, 0, np.nan
    return problem


def arguments(case, problem):
    """Where to differentiate, the rest of the samples, and the direction that multiplies the Hessian."""
    weight, bias, feats, labels, weights = problem or padded_problem(case.num_outputs)
    point = {case.layout: weight.T if case.layout == "kernel" else weight, "bias": bias, "feats": feats}
    rng = np.random.default_rng(1)
    return point, {"labels": labels, "weights": weights}, {name: rng.normal(size=x.shape) for name, x in point.items()}


def tiled_values(point, samples, *, num_values, axis_name):
    head = {name: point[name] for name in point if name != "feats"}
    args, options = (head, point["feats"]), {**samples, "tile_size": TILE}
    values = flatjax.cross_entropy_and_flatness(*args, **options, axis_name=axis_name)
    metrics = (flatjax.relative_flatness, flatjax.simplified_relative_flatness)[: num_values - 2]
    return *values, *(metric(*args, **options) for metric in metrics)


def dense_values(point, samples, *, num_values):
    """From the logits of all samples that count."""
    counts = (samples["weights"] != 0) & (samples["labels"] != -100)
    weights, labels = (jnp.where(counts, samples[name], 0) for name in ("weights", "labels"))
    feats, shares = jnp.where(counts[:, None], point["feats"], 0), weights / jnp.sum(weights)
    W = point["embedding"] if "embedding" in point else point["kernel"].T
    logits = feats @ W.T + point["bias"][None]
    p = jax.nn.softmax(logits)
    measure = shares * jnp.sum(feats**2, axis=1)
    loss = shares @ jax.vmap(helpers.softmax_cross_entropy)(logits, labels)
    kappa = measure @ jnp.sum(p * jnp.sum((W[None] - (p @ W)[:, None]) ** 2, axis=2), axis=1)
    return (loss, kappa, kappa, jnp.sum(W**2) * (measure @ (1 - jnp.sum(p**2, axis=1))))[:num_values]


def differentiated(values_of, order):
    """The values, the gradient of a mixture of them, and its Hessian times a direction, as far as asked for."""

    def mixed(point, samples):
        values = values_of(point, samples)
        return sum(factor * value for factor, value in zip(MIXTURE, values, strict=False)), values

    def compute(point, samples, direction):
        gradient = functools.partial(jax.grad(mixed, has_aux=True), samples=samples)
        if order < 2:
            return gradient(point)[::-1] if order else (values_of(point, samples),)
        *derivatives, values = jax.jvp(gradient, (point,), (direction,), has_aux=True)
        return values, *derivatives

    return compute


@functools.cache
def compiled(case):
    """The program, and where its arguments lie. LLVM's part in it is not what is tested, and takes a third longer."""
    axis_name = tuple(name for name in case.rows + case.samples if name in case.manual)
    axis_name = axis_name[0] if len(axis_name) == 1 else axis_name or None
    values_of = functools.partial(tiled_values, num_values=case.num_values, axis_name=axis_name)
    program = differentiated(values_of, case.order)
    if case.manual:
        in_specs, out_specs = case.specs(case.manual)
        options = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": set(case.manual)}
        program = jax.shard_map(program, mesh=case.mesh, **options)
    shardings = jax.tree.map(functools.partial(NamedSharding, case.mesh), case.specs(ALL)[0])
    lowered = jax.jit(program).lower(*jax.device_put(arguments(case, None), shardings))
    return lowered.compile({"xla_backend_optimization_level": 0}), shardings


@functools.partial(jax.jit, static_argnums=0)
def dense(num_values, *args):
    return differentiated(functools.partial(dense_values, num_values=num_values), 2)(*args)


def split(case, problem=None):
    program, shardings = compiled(case)
    return program(*jax.device_put(arguments(case, problem), shardings))


def assert_split_is_dense(case, problem=None, rtol=1e-12):
    """To `rtol` of the largest entry of an array."""
    got, want = split(case, problem), dense(case.num_values, *arguments(case, problem))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want[: len(got)]), strict=True):
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y)))


def any_case(*cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: " ".join(map(str, case)))


def manual(cases):
    return [case._replace(manual=ALL) for case in cases]


EXPLICIT = AxisType.Explicit
ROWS = [Case(rows=MODEL), Case(rows=ALL, axis_type=EXPLICIT)]
SAMPLES = [Case(samples=DATA), Case(samples=ALL, axis_type=EXPLICIT), Case(rows=MODEL, samples=DATA)]
EMBEDDINGS = [
    Case(2, rows=MODEL, layout="embedding"),
    Case(2, rows=MODEL, samples=DATA, layout="embedding", axis_type=EXPLICIT),
]
INDIVISIBLE = [
    Case(num_outputs=V - 3, layout="embedding", axis_type=EXPLICIT),
    Case(2, samples=DATA, num_outputs=V - 2, axis_type=EXPLICIT),
]
MANUAL = [
    Case(2, rows=ALL, manual=ALL, layout="embedding"),
    Case(2, rows=MODEL, samples=DATA, manual=ALL),
    Case(rows=MODEL, samples=DATA, manual=MODEL),
    Case(rows=MODEL, samples=DATA, manual=DATA, layout="embedding"),
]


@any_case(*ROWS, *SAMPLES, *EMBEDDINGS, *INDIVISIBLE)
def test_arrays_split_among_devices_give_what_the_dense_head_gives(case):
    assert_split_is_dense(case)


@any_case(*manual(ROWS + SAMPLES), *MANUAL)
def test_a_shard_map_gives_what_the_dense_head_gives(case):
    assert_split_is_dense(case)


@any_case(*ROWS, SAMPLES[-1], *EMBEDDINGS)
def test_derivatives_in_a_split_head_are_split_as_it_is(case):
    for derivative in split(case)[1:]:
        for name in (case.layout, "bias"):
            assert derivative[name].sharding.is_equivalent_to(compiled(case)[1][0][name], derivative[name].ndim)


@any_case(*ROWS, *manual(ROWS))
def test_the_largest_logit_may_be_on_every_device(case):
    problem = padded_problem()
    weight, bias = np.tile(problem.weight[:128], (8, 1)), np.tile(problem.bias[:128], 8)
    assert_split_is_dense(case, problem._replace(weight=weight, bias=bias))


@pytest.mark.parametrize("axis_names", [(), ALL], ids=["parts", "devices"])
def test_of_several_largest_logits_the_first_output_is_the_reference(axis_names):
    logits = np.array([[0, 2, 1, 2, 0, 2, 2, 1], [3, 3, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 1, 1.0]]).T
    outputs = np.broadcast_to(10 * np.arange(8)[:, None], logits.shape)
    rows = np.random.default_rng(0).normal(size=(*logits.shape, M))

    def reference(logits, outputs, rows):
        zeros = jnp.zeros_like(logits)
        sums, _ = merged(OnlineSoftmax(logits, outputs, rows, zeros, zeros, zeros, 0 * rows, zeros), axis_names)
        return sums.output, sums.row

    if axis_names:
        reference = jax.shard_map(reference, mesh=Case().mesh, in_specs=PartitionSpec(ALL), out_specs=PartitionSpec())
    output, row = jax.jit(reference)(logits, outputs, rows)
    np.testing.assert_array_equal(output, [10, 0, 60])
    np.testing.assert_array_equal(row, rows[[1, 0, 6], np.arange(3)])


VALUES = [case._replace(order=0) for case in (*ROWS, SAMPLES[-1])]
# Four weights of 3e307, as many as a device has, have a finite sum, and those of all devices have not.
BAD = {
    "weights": [([0, 1, 2, 3, 12, 13, 14, 15], 3e307), (0, -1), (0, np.nan)],
    "labels": [(0, V), (0, -1), (slice(N), -100)],
}
BAD |= {"feats": [(0, np.nan)], "weight": [(-1, np.inf)], "bias": [(-1, np.nan)]}


@any_case(VALUES[-1], *manual(VALUES[-1:]))
def test_what_is_bad_on_one_device_or_in_the_sum_over_all_makes_everything_nan(case):
    for name, changes in BAD.items():
        for place, value in changes:
            problem = helpers.Problem(*map(np.copy, padded_problem()))
            getattr(problem, name)[place] = value
            assert np.all(np.isnan(split(case, problem)[0])), (name, value)


@pytest.mark.parametrize(
    ("axis_name", "samples", "options", "splits"),
    [
        ("data", (), {}, "neither the head nor feats"),
        (("model", "data"), (), {}, "neither the head nor feats"),
        ("model", MODEL, {}, "both the head and feats"),
        ("model", (), {"check_vma": False}, "neither the head nor feats.* check_vma=True"),
    ],
)
def test_an_axis_splits_either_the_rows_or_the_samples(axis_name, samples, options, splits):
    case = Case(rows=MODEL, samples=samples)
    compute = functools.partial(tiled_values, num_values=2, axis_name=axis_name)
    compute = jax.shard_map(
        compute, mesh=case.mesh, in_specs=case.specs(ALL)[0][:2], out_specs=PartitionSpec(), **options
    )
    with helpers.raises(ValueError, f"the axis .* of axis_name splits {splits}"):
        jax.eval_shape(compute, *arguments(case, None)[:2])


class Collective(NamedTuple):
    kind: str
    elements: int
    in_loop: bool


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"


def collectives(program):
    """What the devices of a compiled program send each other."""
    found, in_loop = [], False
    for line in program.as_text().splitlines():
        if line.endswith("{"):
            in_loop = not line.startswith("ENTRY")
        if match := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"\w\[([\d,]*)\]", match[1])
            elements = sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
            found.append(Collective(match[2], elements, in_loop))
    return found


def large_collectives(case):
    """Those of more than an online softmax leaves behind; nothing but a number a device is ever gathered or moved."""
    found = collectives(compiled(case)[0])
    assert found
    assert all(each.kind == "all-reduce" or each.elements <= math.prod(AXES.values()) for each in found)
    return [each for each in found if each.elements > MERGED]


def test_collectives_are_found():
    def compute(feats, kernel):
        logits = feats @ jax.lax.all_gather(kernel, "model", axis=1, tiled=True)
        return jax.lax.scan(lambda total, x: (jax.lax.psum(total + x, "data"), None), logits, jnp.ones(3))[0]

    specs = {"in_specs": (PartitionSpec(), PartitionSpec(None, "model")), "out_specs": PartitionSpec()}
    compute = jax.jit(jax.shard_map(compute, mesh=Case().mesh, **specs, check_vma=False))
    found = collectives(compute.lower(np.ones((N, M)), np.ones((M, V))).compile())
    assert sorted(found) == [Collective("all-gather", M * V, False), Collective("all-reduce", N * V, True)]


@any_case(*VALUES, *manual(VALUES), *ROWS, *manual(ROWS))
def test_of_a_split_head_only_sums_over_its_rows_are_sent(case):
    assert not large_collectives(case)


@any_case(*SAMPLES)
def test_of_split_samples_the_gradient_of_the_kernel_is_summed_tile_by_tile(case):
    (summed,) = large_collectives(case)
    assert summed.in_loop
    # Three products make up the gradient, and each is summed by itself.
    assert M + 1 <= summed.elements / (TILE * case.rows_held / V) <= 3 * M + 2


@any_case(*manual(SAMPLES))
def test_of_the_samples_of_a_shard_map_the_gradient_of_the_kernel_is_summed_once(case):
    (summed,) = large_collectives(case)
    assert not summed.in_loop
    assert 0 <= summed.elements - case.rows_held * (M + 1) < M


def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        command = [sys.executable, pathlib.Path(__file__).with_name("two_processes.py"), str(free.getsockname()[1])]
    with (tmp_path / "log").open("w+") as log:
        options = {
            "stdout": log,
            "stderr": log,
            "env": os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        }
        processes = [subprocess.Popen([*command, str(i)], **options) for i in range(2)]
        try:
            exits = [process.wait(timeout=180) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            log.seek(0)
            print(said := log.read())
    assert exits == [0, 0]
    assert said.count("ok\n") == 2
