"""Neural collapse: a snapshot of it today; see `flatjax.collapse.snapshot`."""
