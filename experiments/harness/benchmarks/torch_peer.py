"""Measure as PyTorch libraries do: Hessian-vector products by curvlinops, and sums by classes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def curvlinops_calls(
    kernels: Sequence[np.ndarray], biases: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, num_probes: int
) -> dict[str, Callable[[], Any]]:
    """Return the gradient and the Hessian's products with several vectors, of a ReLU network's cross-entropy.

    Raises:
        ImportError: PyTorch or curvlinops is not installed.
    """
    import torch
    from curvlinops import HessianLinearOperator

    layers: list[Any] = []
    for kernel, bias in zip(kernels, biases, strict=True):
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
        layers += [linear, torch.nn.ReLU()]
    model, loss = torch.nn.Sequential(*layers[:-1]), torch.nn.CrossEntropyLoss()
    data = [(torch.tensor(x), torch.tensor(y, dtype=torch.long))]
    params = list(model.parameters())
    hessian = HessianLinearOperator(model, loss, params, data, check_deterministic=False)
    probes = torch.sign(torch.randn(hessian.shape[1], num_probes))

    def gradient() -> Any:
        return torch.autograd.grad(loss(model(data[0][0]), data[0][1]), params)

    return {"gradient, torch": gradient, "products, curvlinops": lambda: hessian @ probes}


def one_hot_update(feats: np.ndarray, labels: np.ndarray, num_classes: int) -> Callable[[], Any]:
    """Compute counts and sums of the features by classes, as products with one-hot labels.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch

    samples, classes = torch.tensor(feats), torch.tensor(labels, dtype=torch.long)

    def update() -> Any:
        one_hot = torch.nn.functional.one_hot(classes, num_classes).to(samples.dtype)
        return one_hot.sum(dim=0), one_hot.T @ samples

    return update
