"""Floating-point operations of the denoiser, by formula; a test holds them against torch's FlopCounterMode.

A multiplication and an addition are two operations. Only matrix products and attention are counted.
"""

from .config import PRXConfig, Routing


def forward_flop(config: PRXConfig, tokens: int, text_tokens: int, routing: Routing | None = None) -> float:
    """Operations of one forward pass for one picture of `tokens` image tokens and `text_tokens` text tokens.

    With `routing` enabled the routed blocks see the kept tokens only.
    """
    h, m = config.hidden_size, config.mlp_size
    total = 2.0 * tokens * _embedding_weights(config) + 2.0 * text_tokens * config.context_in_dim * h
    total += 2.0 * (256 * h + h * h)  # time embedding
    for block in range(config.depth):
        routed = routing is not None and routing.enabled and routing.start <= block <= routing.end
        seen = _kept(tokens, routing.selection_ratio) if routed and routing is not None else tokens
        total += 2.0 * seen * (4 * h * h + 3 * h * m)  # q, k, v, output; gate, up, down
        total += 2.0 * text_tokens * 2 * h * h + 2.0 * h * 6 * h  # text k, v; modulation
        total += 4.0 * seen * (seen + text_tokens) * h  # scores and weighted values
    return total + 2.0 * h * 2 * h + 2.0 * tokens * h * config.patch_features


def training_flop(config: PRXConfig, tokens: int, text_tokens: int, routing: Routing | None = None) -> float:
    """Forward and backward for one picture: three forwards, less the input gradients of pixels and frozen text."""
    first = config.bottleneck_size or config.hidden_size
    unneeded = (
        2.0 * tokens * config.patch_features * first + 2.0 * text_tokens * config.context_in_dim * config.hidden_size
    )
    return 3.0 * forward_flop(config, tokens, text_tokens, routing) - unneeded


def _embedding_weights(config: PRXConfig) -> int:
    if config.bottleneck_size is None:
        return config.patch_features * config.hidden_size
    return config.bottleneck_size * (config.patch_features + config.hidden_size)


def _kept(tokens: int, selection_ratio: float) -> int:
    """As `prx_kernels.kept_tokens`, without importing torch."""
    return tokens - min(max(round(tokens * selection_ratio), 1), tokens - 1)
