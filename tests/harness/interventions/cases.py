"""Records of an intervention as a run leaves them."""

NAMES = ["loss", "relative_flatness", "simplified_relative_flatness", "ncc", "softened_ncc"]


def records(held_out, train=None, arm="baseline", seed=0, every=10, **others):
    """Records of one arm and seed, of these accuracies, with every measure at 1 but those that are given."""
    train = [1.0] * len(held_out) if train is None else train
    return [
        {"arm": arm, "seed": seed, "step": every * i, "train_accuracy": train[i], "held_out_accuracy": accuracy}
        | {f"train_{name}": 1.0 for name in NAMES}
        | {name: values[i] for name, values in others.items()}
        for i, accuracy in enumerate(held_out)
    ]
