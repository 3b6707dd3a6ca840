"""Measure how a loss curves in the directions W A of relative flatness: probed, or summed over a basis of them.

In a stack of layers each has its κ. The first axis of what is returned is that of the stack, or has one entry.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from flatjax.core.sharding import gathered, placed_like
from flatjax.core.trees import Tree, leaves_by_path
from flatjax.curvature.jaxprs import with_convolutions_in_order
from flatjax.curvature.products import Hessian
from flatjax.curvature.vectors import random_signs
from flatjax.layers.kernels import Layer
from flatjax.layers.reading.outputs import LayerOutputs


class _OfOutputs(NamedTuple):
    """What a loss makes of the outputs of one layer: its Hessian in them, times a shift of them; and the features."""

    product: Callable[[Float[Array, "n d"]], Float[Array, "n d"]]
    feats: Float[Array, "n m"]


class LayerCurvature(NamedTuple):
    """The curvature of a loss in the kernel of one layer, or in those of each layer of a stack.

    The directions are G S in place of a kernel's matrix, with S (r, d) such that Sᵀ S = W Wᵀ, r = min(d, m), and G (m,
    r) of independent entries ±1. They have the mean and the covariance of Aᵀ Wᵀ at the least cost.
    """

    loss_fn: Callable[..., Any]
    params: Tree
    batch: tuple[Any, ...]
    layer: Layer
    chunk_size: int = 1

    @property
    def kernel(self) -> Float[Array, "..."]:
        """The kernel at the precision of the sums, whatever the network computes in."""
        return self._hessian.like[self.layer.path]

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(leaves_by_path(self.params)[self.layer.path])

    @property
    def num_layers(self) -> int:
        """How many layers a stack holds; 1 if it is none."""
        return math.prod(self.layer.stack_shape(self.shape))

    @property
    def num_features(self) -> int:
        return self.layer.num_features(self.shape)

    @property
    def num_outputs(self) -> int:
        return math.prod(self.shape) // (self.num_layers * self.num_features)

    @property
    def rank(self) -> int:
        """The rank r that W has at most."""
        return min(self.num_features, self.num_outputs)

    @property
    def num_directions(self) -> int:
        """How many directions a basis of all W A has."""
        return self.rank * self.num_features

    def probes(self, keys: Key[Array, " k"]) -> Float[Array, "k l"]:
        """⟨W A, H[W A]⟩ with one draw of A for each key, of each layer by itself; the mean over all draws is κ."""
        form, bases = self._quadratic_form(), self._bases()

        def of_layer(index: Array | int) -> Float[Array, " k"]:
            of_layer = keys if self.num_layers == 1 else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            return self._map(lambda key: form(self._signed(key, bases[index]), index), of_layer)

        return self._of_each_layer(of_layer).T

    def draw(self) -> Callable[[Key[Array, ""]], Float[Array, "l m d"]]:
        """Makes a function that draws Aᵀ Wᵀ of each layer from a key, or what has its mean and covariance."""
        bases = self._bases()

        def draw(key: Key[Array, ""]) -> Float[Array, "l m d"]:
            if self.num_layers == 1:
                return self._signed(key, bases[0])[None]
            return jax.vmap(self._signed)(jax.random.split(key, self.num_layers), bases)

        return draw

    def by_weights(self) -> Float[Array, " l"]:
        """Sums over a basis of weights: κ = Σ_f Σ_j ⟨e_f s_jᵀ, H[e_f s_jᵀ]⟩."""
        form, bases = self._quadratic_form(), self._bases()

        def of_layer(index: Array | int) -> Float[Array, ""]:
            basis = bases[index]

            def of_place(place: Array) -> Float[Array, ""]:
                is_feature = (jnp.arange(self.num_features) == place // len(basis)).astype(basis.dtype)
                return form(is_feature[:, None] * basis[place % len(basis)][None, :], index)

            return jnp.sum(self._map(of_place, jnp.arange(self.num_directions)))

        return self._of_each_layer(of_layer)

    def by_outputs(self, outputs: LayerOutputs) -> Float[Array, " l"]:
        """κ by rows, else by samples; it is NaN if samples interact."""
        num_rows, nan = math.prod(outputs.rows), jnp.asarray(jnp.nan, self.dtype)

        def of_layer(index: Array | int) -> Float[Array, ""]:
            of_outputs = self._of_outputs(outputs, index)

            def by_samples() -> Float[Array, ""]:
                are_apart = self._are_apart(of_outputs, outputs.rows[0])
                return jax.lax.cond(are_apart, lambda: self._by_samples(of_outputs, outputs.rows, index), lambda: nan)

            # Of rows that are samples there is nothing else to look at.
            otherwise = by_samples if len(outputs.rows) > 1 else lambda: nan
            are_apart = self._are_apart(of_outputs, num_rows)
            return jax.lax.cond(are_apart, lambda: self._by_rows(of_outputs, index), otherwise)

        return self._of_each_layer(of_layer)

    def rows_are_apart(self, outputs: LayerOutputs) -> Bool[Array, ""]:
        """Whether no feature vector changes the gradient by the output of another of the same layer."""
        num_rows = math.prod(outputs.rows)
        return jnp.all(self._of_each_layer(lambda index: self._are_apart(self._of_outputs(outputs, index), num_rows)))

    def by_rows(self, outputs: LayerOutputs) -> tuple[Bool[Array, ""], Float[Array, " l"]]:
        """Whether feature vectors are apart, as above, and κ = Σ_a ‖φ_a‖² Σ_j ⟨s_j, G_aa s_j⟩ where they are."""
        num_rows, nan = math.prod(outputs.rows), jnp.asarray(jnp.nan, self.dtype)

        def of_layer(index: Array | int) -> tuple[Bool[Array, ""], Float[Array, ""]]:
            of_outputs = self._of_outputs(outputs, index)
            are_apart = self._are_apart(of_outputs, num_rows)
            return are_apart, jax.lax.cond(are_apart, lambda: self._by_rows(of_outputs, index), lambda: nan)

        are_apart, kappas = self._of_each_layer(of_layer)
        return jnp.all(are_apart), kappas

    def _by_rows(self, of_outputs: _OfOutputs, index: Array | int) -> Float[Array, ""]:
        product, feats = of_outputs
        measure = jnp.sum(feats**2, axis=1)

        def curvature(direction: Float[Array, " d"]) -> Float[Array, ""]:
            change = product(jnp.broadcast_to(direction[None, :], (len(feats), len(direction))))
            return jnp.sum(measure * jnp.sum(change * direction[None, :], axis=1))

        return jnp.sum(self._map(curvature, self._bases()[index]))

    def _by_samples(self, of_outputs: _OfOutputs, rows: tuple[int, ...], index: Array | int) -> Float[Array, ""]:
        """κ = Σ_i Σ_{a,b} ⟨φ_ia, φ_ib⟩ Σ_j ⟨s_j, G_ab s_j⟩, where no sample interacts with another."""
        product, feats = of_outputs
        basis, (num_samples, *positions) = self._bases()[index], rows
        num_positions = math.prod(positions)
        feats = feats.reshape(num_samples, num_positions, -1)
        overlaps = jnp.einsum("iam,ibm->iab", feats, feats, precision="highest")

        def curvature(place: Array) -> Float[Array, ""]:
            position, direction = place // len(basis), basis[place % len(basis)]
            is_position = (jnp.arange(num_positions) == position).astype(basis.dtype)
            shift = jnp.broadcast_to(
                is_position[None, :, None] * direction[None, None, :], (num_samples, num_positions, len(direction))
            )
            change = jnp.sum(product(shift.reshape(-1, len(direction))) * direction[None, :], axis=1)
            return jnp.sum(jnp.einsum("iab,b->ia", overlaps, is_position) * change.reshape(num_samples, num_positions))

        return jnp.sum(self._map(curvature, jnp.arange(num_positions * len(basis))))

    def _are_apart(self, of_outputs: _OfOutputs, num_groups: int) -> Bool[Array, ""]:
        """Whether groups of consecutive rows do not interact.

        A Hessian is symmetric, and any two groups have numbers that differ in a bit. For each bit, the groups that have
        it are shifted at random, and the gradient of the others must stay where it is, to the last digit.
        """
        product, feats = of_outputs
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

    def _bases(self) -> Float[Array, "l r d"]:
        """The basis S of each layer."""
        matrices = self.layer.matrices(self.kernel)
        return matrices if matrices.shape[1] <= matrices.shape[2] else jnp.linalg.qr(gathered(matrices), mode="r")

    def _of_each_layer(self, function: Callable[[Array | int], Any]) -> Any:
        """Runs one program for all layers of a stack."""
        if self.num_layers == 1:
            return jax.tree.map(lambda value: value[None], function(0))
        return jax.lax.map(function, jnp.arange(self.num_layers))

    def _signed(self, key: Key[Array, ""], basis: Float[Array, "r d"]) -> Float[Array, "m d"]:
        signs = random_signs(key, (self.num_features, len(basis)), basis.dtype)
        return jnp.matmul(signs, basis, precision="highest")

    def _quadratic_form(self) -> Callable[[Float[Array, "m d"], Array | int], Float[Array, ""]]:
        """Makes the function ⟨v, H v⟩ for a direction v of one layer."""
        path, kernel, product = self.layer.path, self.kernel, self._hessian.linearised()
        layers = jnp.arange(self.num_layers)

        def form(matrix: Float[Array, "m d"], index: Array | int) -> Float[Array, ""]:
            matrices = matrix[None]
            if self.num_layers > 1:
                matrices = jnp.where((layers == index)[:, None, None], matrices, 0)
            vector = placed_like(self.layer.kernel(matrices, kernel.shape), kernel)
            return jnp.sum(vector * product({path: vector})[path])

        return form

    def _of_outputs(self, outputs: LayerOutputs, index: Array | int) -> _OfOutputs:
        shift = jnp.zeros((math.prod(outputs.rows), self.num_outputs), self.dtype)
        feats = outputs.shifted(shift, index)[1].astype(self.dtype)
        gradient = jax.grad(lambda shift: outputs.shifted(shift, index)[0])
        product = with_convolutions_in_order(jax.linearize(gradient, shift)[1])
        return _OfOutputs(lambda change: product(placed_like(change, shift)), feats)

    def _map(self, function: Callable[[Any], Any], values: Shaped[Array, "k ..."]) -> Any:
        return jax.lax.map(function, values, batch_size=None if self.chunk_size == 1 else self.chunk_size)


def joint_probes(layers: Sequence[LayerCurvature], keys: Key[Array, " k"]) -> list[Float[Array, "k _"]]:
    """⟨v_l, (H v)_l⟩ of several layers of one loss, v = (W_l A_l)_l; the mean over all draws is κ of each layer."""
    first, paths = layers[0], tuple(each.layer.path for each in layers)
    hessian = Hessian(first.loss_fn, first.params, first.batch, paths)
    kernels, product = hessian.like, hessian.linearised()
    draws = [each.draw() for each in layers]

    def forms(key: Key[Array, ""]) -> list[Float[Array, " _"]]:
        keys = jax.random.split(key, len(layers))
        vectors = {}
        for i, (each, draw) in enumerate(zip(layers, draws, strict=True)):
            kernel = kernels[each.layer.path]
            vectors[each.layer.path] = placed_like(each.layer.kernel(draw(keys[i]), kernel.shape), kernel)
        products = product(vectors)
        return [
            jnp.sum(each.layer.matrices(vectors[path] * products[path]), axis=(1, 2))
            for each, path in zip(layers, paths, strict=True)
        ]

    return jax.lax.map(forms, keys)
