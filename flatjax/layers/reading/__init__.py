"""The program of a loss, read for how it uses each kernel: private to `flatjax.layers`.

In reading order: `program` (the loss as traced), `axes` and `moves` (where a kernel's axes go), `uses` (what a kernel
is multiplied with), `feature_axes` (which of its axes are the features'), `products`, `rerun` and `outputs` (the loss
as a function of a layer's outputs).
"""
