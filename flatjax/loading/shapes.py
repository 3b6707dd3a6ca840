"""The shapes of a decoder's parameters, worked out from its configuration without building it.

So a checkpoint is held against its config.json before anything is made that is as large as that says.
"""

from collections.abc import Iterator

from flatjax.models.decoder.config import DecoderConfig

Shape = tuple[int, ...]


def decoder_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """The shapes of all parameters of `Decoder(config)`, by path."""
    shapes: dict[str, Shape] = {"token_embedding/embedding": (config.vocab_size, config.width)}
    if config.positions == "learned":
        shapes["position_embedding/embedding"] = config.context, config.width
    for i in range(config.depth):
        shapes |= {f"blocks/{i}/{path}": shape for path, shape in _of_block(config)}
    shapes |= dict(_of_norm("norm", config.width, config.norm))
    if not config.tied:
        shapes["head/kernel"] = config.width, config.vocab_size
    return shapes


def _of_block(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, head = config.width, config.width_within, config.width_of_a_head
    queries, keys = config.num_heads * head, config.key_value_heads * head
    for norm in ("attention_norm", "perceptron_norm"):
        yield from _of_norm(norm, width, config.norm)
    for name, outputs in (("query", queries), ("key", keys), ("value", keys)):
        yield from _of_linear(f"attention/{name}", width, outputs, config.query_key_value_bias)
    yield from _of_linear("attention/output", queries, width, config.output_bias)
    if config.query_key_norm:
        for name in ("query_norm", "key_norm"):
            yield from _of_norm(f"attention/{name}", head, "rms")
    for name in ("gate", "up") if config.gated else ("up",):
        yield from _of_linear(f"perceptron/{name}", width, inner, config.perceptron_bias)
    yield from _of_linear("perceptron/down", inner, width, config.perceptron_bias)


def _of_linear(path: str, inputs: int, outputs: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/kernel", (inputs, outputs)
    if has_bias:
        yield f"{path}/bias", (outputs,)


def _of_norm(path: str, width: int, kind: str) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/scale", (width,)
    if kind == "layer":
        yield f"{path}/bias", (width,)
