"""The formulas of neural collapse in float64 NumPy: loops, dense covariances, means first and squares second."""

import itertools
from collections.abc import Mapping

import numpy as np


def neural_collapse(
    kernel: np.ndarray, bias: np.ndarray, feats: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> Mapping[str, float]:
    """Every field of `NeuralCollapse` of kernel (m, C), bias (C,), feats (n, m), labels (n,) and weights (n,)."""
    head, bias, feats, weights = (x.astype(np.float64) for x in (kernel.T, bias, feats, weights))
    samples = [sample for sample in zip(feats, labels, weights, strict=True) if sample[2] != 0]
    counts = [sum(label == c for _, label, _ in samples) for c in range(len(head))]
    kept = [c for c, count in enumerate(counts) if count >= 2]
    samples = [sample for sample in samples if sample[1] in kept]
    total = sum(omega for _, _, omega in samples)
    num_kept, num_features = len(kept), head.shape[1]

    means, variances = {}, {}
    for k in kept:
        mass = sum(omega for _, c, omega in samples if c == k)
        means[k] = sum(omega * h for h, c, omega in samples if c == k) / mass
        variances[k] = sum(omega * np.sum((h - means[k]) ** 2) for h, c, omega in samples if c == k) / mass
    grand_mean = sum(means.values()) / num_kept
    centred = np.array([means[c] - grand_mean for c in kept])
    rows = head[kept]

    within = sum(omega * np.outer(h - means[c], h - means[c]) for h, c, omega in samples) / total
    between = sum(np.outer(row, row) for row in centred) / num_kept
    # The eigenvalues that centring makes 0 are rounded to about 1e-16 of the largest.
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-11, hermitian=True)) / num_kept

    ncc = sum(
        (variances[c] + variances[k]) / (2 * np.sum((means[c] - means[k]) ** 2))
        for c, k in itertools.permutations(kept, 2)
    )
    disagreement = sum(
        omega
        for h, _, omega in samples
        if np.argmax(head @ h + bias) != min(kept, key=lambda c: np.sum((h - means[c]) ** 2))
    )
    gram, simplex = centred @ centred.T, np.eye(num_kept) - 1 / num_kept
    return {
        "nc1": nc1,
        "nc2_equinorm_means": _equinorm(centred),
        "nc2_equinorm_classifier": _equinorm(rows),
        "nc2_equiangularity_means": np.mean([abs(cos + 1 / (num_kept - 1)) for cos in _cosines(centred)]),
        "nc2_equiangularity_classifier": np.mean([abs(cos + 1 / (num_kept - 1)) for cos in _cosines(rows)]),
        "nc2_cosine_std_means": np.std(_cosines(centred)),
        "nc2_cosine_std_classifier": np.std(_cosines(rows)),
        "nc2_etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - simplex / np.sqrt(num_kept - 1)),
        "nc2_etf_floor": np.sqrt(2 - 2 * np.sqrt(min(1, num_features / (num_kept - 1)))),
        "nc3": np.linalg.norm(rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)) ** 2,
        "nc4": disagreement / total,
        "cdnv": ncc / (num_kept * (num_kept - 1)),
        "ncc": ncc,
        "num_classes_kept": num_kept,
        "num_classes_empty": counts.count(0),
        "num_classes_single": counts.count(1),
    }


def _equinorm(rows: np.ndarray) -> float:
    norms = [np.linalg.norm(row) for row in rows]
    return np.std(norms, ddof=1) / np.mean(norms)


def _cosines(rows: np.ndarray) -> list[float]:
    return [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in itertools.permutations(rows, 2)]


def classes_of(feats: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_classes: int, min_count: int = 2):
    """The kept classes, and of these the means, the variances and the covariance of all samples within."""
    feats, weights = feats.astype(np.float64), weights.astype(np.float64)
    kept = [c for c in range(num_classes) if np.sum(labels == c) >= min_count]
    means, variances, products, mass = [], [], 0, 0
    for c in kept:
        own = labels == c
        means.append(np.average(feats[own], axis=0, weights=weights[own]))
        residuals = feats[own] - means[-1]
        variances.append(np.average(np.sum(residuals**2, axis=1), weights=weights[own]))
        products += (residuals.T * weights[own]) @ residuals
        mass += weights[own].sum()
    return kept, np.array(means), np.array(variances), products / mass


def cdnv(means: np.ndarray, variances: np.ndarray) -> float:
    pairs = itertools.permutations(range(len(means)), 2)
    return np.mean([(variances[i] + variances[j]) / (2 * np.sum((means[i] - means[j]) ** 2)) for i, j in pairs])


def nc1(means: np.ndarray, within: np.ndarray) -> float:
    centred = means - means.mean(axis=0)
    between = centred.T @ centred / len(means)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-11, hermitian=True)) / len(means)


def nc2(rows: np.ndarray, ddof: int = 1) -> Mapping[str, float]:
    """Of centred means, or of the rows of a classifier."""
    count = len(rows)
    norms = np.linalg.norm(rows, axis=1)
    gram, simplex = rows @ rows.T, np.eye(count) - 1 / count
    directions = rows / norms[:, None]
    logs = [-np.log(np.linalg.norm(x - y)) for x, y in itertools.permutations(directions, 2)]
    return {
        "equinorm": np.std(norms, ddof=ddof) / np.mean(norms),
        "equiangularity": np.mean([abs(cos + 1 / (count - 1)) for cos in _cosines(rows)]),
        "cosine_std": np.std(_cosines(rows)),
        "etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - simplex / np.sqrt(count - 1)),
        "gnc2_mean": np.mean(logs),
        "gnc2_variation": np.std(logs) / abs(np.mean(logs)),
    }


def duality(rows: np.ndarray, centred: np.ndarray) -> Mapping[str, float]:
    cosines = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(rows, centred, strict=True)]
    return {
        "nc3": np.linalg.norm(rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)) ** 2,
        "unc3": np.std(cosines) / abs(np.mean(cosines)),
    }
