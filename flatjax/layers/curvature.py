"""How a loss curves in the directions W A that relative flatness is made of: probed, or summed over a basis of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from flatjax.curvature.convolutions import with_convolutions_in_order
from flatjax.curvature.leaves import Tree
from flatjax.curvature.products import Hessian
from flatjax.curvature.vectors import random_signs
from flatjax.layers.kernels import Layer
from flatjax.layers.outputs import LayerOutputs
from flatjax.sharding import gathered, placed_like


class LayerCurvature(NamedTuple):
    """The curvature of a loss in the kernel of one layer.

    The directions are G S of the kernel's matrix, with S (r, d) such that Sᵀ S = W Wᵀ, r = min(d, m), and G (m, r) of
    independent entries ±1: they have the mean and the covariance of Aᵀ Wᵀ at the least cost.
    """

    loss_fn: Callable[..., Any]
    params: Tree
    batch: tuple[Any, ...]
    layer: Layer
    chunk_size: int = 1

    @property
    def kernel(self) -> Float[Array, "..."]:
        """At the precision of the sums, whatever the network computes in."""
        return self._hessian.like[self.layer.path]

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel.dtype

    @property
    def num_outputs(self) -> int:
        return self.layer.matrix(self.kernel).shape[1]

    @property
    def rank(self) -> int:
        """r, of W at most."""
        return min(self.layer.matrix(self.kernel).shape)

    @property
    def num_directions(self) -> int:
        """Of a basis of all W A."""
        return self.rank * self.layer.num_features(self.kernel.shape)

    def probes(self, keys: Key[Array, " k"]) -> Float[Array, " k"]:
        """⟨W A, H[W A]⟩ for a draw of A a key; their mean over all draws is κ."""
        return self._quadratic_forms(self.draws(), keys)

    def draws(self) -> Callable[[Key[Array, ""]], Float[Array, "m d"]]:
        """Aᵀ Wᵀ for a key, or what has its mean and covariance."""
        basis, num_features = self._basis(), self.layer.num_features(self.kernel.shape)

        def draw(key: Key[Array, ""]) -> Float[Array, "m d"]:
            signs = random_signs(key, (num_features, len(basis)), basis.dtype)
            return jnp.matmul(signs, basis, precision="highest")

        return draw

    def by_weights(self) -> Float[Array, ""]:
        """κ = Σ_f Σ_j ⟨e_f s_jᵀ, H[e_f s_jᵀ]⟩."""
        basis, num_features = self._basis(), self.layer.num_features(self.kernel.shape)

        def direction(index: Array) -> Float[Array, "m d"]:
            is_feature = (jnp.arange(num_features) == index // len(basis)).astype(basis.dtype)
            return is_feature[:, None] * basis[index % len(basis)][None, :]

        return jnp.sum(self._quadratic_forms(direction, jnp.arange(self.num_directions)))

    def by_outputs(self, outputs: LayerOutputs) -> Float[Array, ""]:
        """κ by `by_rows`, else by `by_samples`; NaN if samples interact."""

        def by_samples() -> Float[Array, ""]:
            nan = jnp.asarray(jnp.nan, self.dtype)
            return jax.lax.cond(
                self._are_apart(outputs, outputs.rows[0]), lambda: self.by_samples(outputs), lambda: nan
            )

        return jax.lax.cond(self.rows_are_apart(outputs), lambda: self.by_rows(outputs), by_samples)

    def rows_are_apart(self, outputs: LayerOutputs) -> Bool[Array, ""]:
        """Whether no feature vector changes the gradient by the output of another."""
        return self._are_apart(outputs, math.prod(outputs.rows))

    def by_rows(self, outputs: LayerOutputs) -> Float[Array, ""]:
        """κ = Σ_a ‖φ_a‖² Σ_j ⟨s_j, G_aa s_j⟩, where no feature vector interacts with another."""
        product, feats = self._product_of_outputs(outputs)
        measure = jnp.sum(feats**2, axis=1)

        def curvature(direction: Float[Array, " d"]) -> Float[Array, ""]:
            change = product(jnp.broadcast_to(direction[None, :], (len(feats), len(direction))))
            return jnp.sum(measure * jnp.sum(change * direction[None, :], axis=1))

        return jnp.sum(self._map(curvature, self._basis()))

    def by_samples(self, outputs: LayerOutputs) -> Float[Array, ""]:
        """κ = Σ_i Σ_{a,b} ⟨φ_ia, φ_ib⟩ Σ_j ⟨s_j, G_ab s_j⟩, where no sample interacts with another."""
        product, feats = self._product_of_outputs(outputs)
        basis, (num_samples, *positions) = self._basis(), outputs.rows
        num_positions = math.prod(positions)
        feats = feats.reshape(num_samples, num_positions, -1)
        overlaps = jnp.einsum("iam,ibm->iab", feats, feats, precision="highest")

        def curvature(index: Array) -> Float[Array, ""]:
            place, direction = index // len(basis), basis[index % len(basis)]
            is_place = (jnp.arange(num_positions) == place).astype(basis.dtype)
            shift = jnp.broadcast_to(
                is_place[None, :, None] * direction[None, None, :], (num_samples, num_positions, len(direction))
            )
            change = jnp.sum(product(shift.reshape(-1, len(direction))) * direction[None, :], axis=1)
            return jnp.sum(jnp.einsum("iab,b->ia", overlaps, is_place) * change.reshape(num_samples, num_positions))

        return jnp.sum(self._map(curvature, jnp.arange(num_positions * len(basis))))

    def _are_apart(self, outputs: LayerOutputs, num_groups: int) -> Bool[Array, ""]:
        """Whether groups of consecutive rows do not interact.

        A Hessian is symmetric, and any two groups have numbers that differ in a bit: for each bit, the groups that have
        it are shifted at random, and the gradient of the others must stay where it is, to the last digit.
        """
        product, feats = self._product_of_outputs(outputs)
        group = jnp.arange(len(feats)) // (len(feats) // num_groups)
        shift = jax.random.normal(jax.random.key(0), (len(feats), self.num_outputs), self.dtype)

        def is_apart(bit: Array) -> Bool[Array, ""]:
            moved = (group >> bit) % 2 == 1
            return jnp.all(moved[:, None] | (product(jnp.where(moved[:, None], shift, 0)) == 0))

        bits = jnp.arange(max(num_groups - 1, 1).bit_length())
        return jnp.all(jax.lax.map(is_apart, bits))

    @property
    def _hessian(self) -> Hessian:
        return Hessian(self.loss_fn, self.params, self.batch, (self.layer.path,))

    def _basis(self) -> Float[Array, "r d"]:
        matrix = self.layer.matrix(self.kernel)
        return matrix if matrix.shape[0] <= matrix.shape[1] else jnp.linalg.qr(gathered(matrix), mode="r")

    def _quadratic_forms(
        self, direction: Callable[[Array], Float[Array, "m d"]], indices: Shaped[Array, " k"]
    ) -> Float[Array, " k"]:
        """⟨v, H v⟩ for the directions of several indices, made when they are needed."""
        path, kernel, product = self.layer.path, self.kernel, self._hessian.linearised()

        def form(index: Array) -> Float[Array, ""]:
            vector = placed_like(self.layer.kernel(direction(index), kernel.shape), kernel)
            return jnp.sum(vector * product({path: vector})[path])

        return self._map(form, indices)

    def _product_of_outputs(
        self, outputs: LayerOutputs
    ) -> tuple[Callable[[Float[Array, "n d"]], Float[Array, "n d"]], Float[Array, "n m"]]:
        """The Hessian of the loss in the layer's outputs, times a shift of them; and the features."""
        shift = jnp.zeros((math.prod(outputs.rows), self.num_outputs), self.dtype)
        feats = outputs.shifted(shift)[1].astype(self.dtype)
        gradient = jax.grad(lambda shift: outputs.shifted(shift)[0])
        product = with_convolutions_in_order(jax.linearize(gradient, shift)[1])
        return lambda change: product(placed_like(change, shift)), feats

    def _map(self, function: Callable[[Any], Any], values: Shaped[Array, "k ..."]) -> Any:
        return jax.lax.map(function, values, batch_size=None if self.chunk_size == 1 else self.chunk_size)


def joint_probes(layers: Sequence[LayerCurvature], keys: Key[Array, " k"]) -> Float[Array, "k l"]:
    """⟨v_l, (H v)_l⟩ of several layers of one loss, v = (W_l A_l)_l; the mean over all draws is κ of each layer."""
    first, paths = layers[0], tuple(each.layer.path for each in layers)
    hessian = Hessian(first.loss_fn, first.params, first.batch, paths)
    kernels, product = hessian.like, hessian.linearised()
    draws = [each.draws() for each in layers]

    def forms(key: Key[Array, ""]) -> Float[Array, " l"]:
        keys = jax.random.split(key, len(layers))
        vectors = {}
        for i, (each, draw) in enumerate(zip(layers, draws, strict=True)):
            kernel = kernels[each.layer.path]
            vectors[each.layer.path] = placed_like(each.layer.kernel(draw(keys[i]), kernel.shape), kernel)
        products = product(vectors)
        return jnp.stack([jnp.sum(vectors[path] * products[path]) for path in paths])

    return jax.lax.map(forms, keys)
