"""The order of layers by their names."""

import pytest

from flatjax.layers.names import in_forward_order


@pytest.mark.parametrize(
    "paths",
    [
        ["layers/0/kernel", "layers/2/kernel", "layers/10/kernel", "head/kernel"],
        ["stem/kernel", "blocks/0/first/kernel", "blocks/0/second/kernel", "blocks/0/shortcut/kernel", "head/kernel"],
        ["patch_embedding/kernel", *(f"blocks/0/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
         "blocks/0/up/kernel", "blocks/0/down/kernel", "blocks/1/attention/query/kernel", "head/kernel"],
    ],
)  # fmt: skip
def test_layers_go_from_the_input_to_the_head(paths):
    assert in_forward_order(sorted(paths)) == paths
