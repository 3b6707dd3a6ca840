"""From the second call with the same shapes on nothing compiles, whatever is called, and outside of `jax.jit` too."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest

import flatjax
import flatjax.collapse
import flatjax.flatness
import flatjax.representations
from harness.benchmarks.calls import Call, public_calls

PUBLIC = {
    name: getattr(module, name)
    for module in (flatjax, flatjax.collapse, flatjax.flatness, flatjax.representations)
    for name in dir(module)
    if not name.startswith("_")
}


# Of one shape in all tests, so that what one of them compiles the others have.
RNG = np.random.default_rng(0)
HEAD = {"kernel": RNG.normal(size=(5, 4)).astype("float32"), "bias": np.zeros(4, "float32")}
FEATS, LABELS = RNG.normal(size=(40, 5)).astype("float32"), np.arange(40) % 4


@contextmanager
def compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def listen(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def count(call: Callable[[], object]) -> int:
    with compilations() as events:
        jax.block_until_ready(jax.tree.leaves(call()))
    return len(events)


def test_what_is_counted_is_a_compilation_for_each_shape():
    double = jax.jit(lambda x: 2 * x)
    assert [count(lambda n=n: double(np.ones(n))) for n in (3, 3, 4, 4)] == [1, 0, 1, 0]


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    return public_calls(num_samples=len(LABELS), num_features=FEATS.shape[1], num_classes=4)


def test_there_is_a_call_of_every_public_function(calls):
    is_state = {"ClassMoments", "FeatureSpectrum"}
    functions = {name for name, value in PUBLIC.items() if inspect.isfunction(value)} | is_state
    assert functions <= calls.keys()
    methods = {f"{name}.{method}" for name in is_state for method in ("update", "merge")}
    assert methods <= calls.keys()


def test_later_calls_outside_of_jit_compile_nothing(calls):
    for call in calls.values():
        call()
    compiled = {name: count(call) + count(call) for name, call in calls.items()}
    assert {name: number for name, number in compiled.items() if number} == {}


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("read", [np.asarray, np.ndarray.tolist])
def test_arrays_of_numpy_and_lists_compile_once_and_their_values_do_not_matter(read, x64):
    def call(scale: float) -> object:
        params = {name: read(scale * array.astype(float)) for name, array in HEAD.items()}
        return flatjax.relative_flatness(params, read(FEATS.astype(float)), read(LABELS), read(np.full(40, scale)))

    with jax.enable_x64(x64):
        call(1.0)
        assert [count(lambda: call(2.0)), count(lambda: call(3.0))] == [0, 0]


def test_numbers_and_keys_are_no_reasons_to_compile():
    batch = HEAD, FEATS, LABELS

    def call(delta: float, seed: int) -> object:
        return flatjax.feature_robustness(*batch, delta=delta, key=jax.random.key(seed), num_samples=4)

    call(0.1, 0)
    assert [count(lambda: call(0.2, 1)), count(lambda: call(0.3, 2))] == [0, 0]


def test_how_an_argument_is_passed_is_no_reason_to_compile():
    weights = np.ones(40, "float32")
    flatjax.row_block_traces(HEAD, FEATS, LABELS, weights)
    assert count(lambda: flatjax.row_block_traces(params=HEAD, feats=FEATS, labels=LABELS, weights=weights)) == 0
    assert count(lambda: flatjax.row_block_traces(HEAD, FEATS, LABELS, weights, loss="softmax_cross_entropy")) == 0


WEIGHTS = RNG.uniform(1, 2, (3, 40)).astype("float32")


# That `neural_collapse` is mapped and scanned with weights of its own is tested with its other transformations.
@pytest.mark.parametrize("name", ["relative_flatness", "cross_entropy_and_flatness"])
def test_weights_may_be_traced_and_mapped(name):
    function = PUBLIC[name]
    each = jax.tree.map(lambda *x: np.stack(x), *[function(HEAD, FEATS, LABELS, w) for w in WEIGHTS])
    mapped = jax.jit(jax.vmap(lambda w: function(HEAD, FEATS, LABELS, weights=w)))(WEIGHTS)
    _, scanned = jax.lax.scan(lambda _, w: (None, function(HEAD, FEATS, LABELS, weights=w)), None, WEIGHTS)
    for results in zip(*map(jax.tree.leaves, (each, mapped, scanned)), strict=True):
        for got in results[1:]:
            np.testing.assert_allclose(got, results[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["relative_flatness", "neural_collapse", "cross_entropy_and_flatness"])
def test_weights_may_be_differentiated(name):
    def first(w: jax.Array) -> jax.Array:
        return jax.tree.leaves(PUBLIC[name](HEAD, FEATS, LABELS, w))[0]

    change = np.zeros(40, "float32")
    change[3] = 1e-2
    slope = (first(WEIGHTS[0] + change) - first(WEIGHTS[0] - change)) / 2e-2
    # Compiled, so that what the first result does not need is left out.
    np.testing.assert_allclose(jax.jit(jax.grad(first))(WEIGHTS[0])[3], slope, rtol=2e-2, atol=1e-4)
