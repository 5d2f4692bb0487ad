"""The handle on a routed range of blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import verify
from .passage import Passage


class Route(Passage):
    """What `route_blocks` returns: the handle on a routed range of blocks. All of it may be set between two forwards.

    Attributes:
        enabled: True; False makes the blocks dense until it is True again.
        probability: 1; the share of forwards that are routed, the others are dense. Drawn anew at every forward, alike
            on all ranks. Needs blocks that are eager or compiled in place (`block.compile()`).
        selection_ratio: share of the tokens that bypass the blocks, below 1; 0 is dense.
        keep: (batch, K) int32, the tokens kept in the last routed forward of this thread, prefix and suffix not
            counted; None before it. For REPA: `gather_tokens(target, route.keep)` are the targets of the features of a
            routed block.
        fixed: None, or (batch, K) integers to keep in place of a draw, unique in each row (K = all tokens in any order
            is allowed), with `shared` the same in every row: for sets of one's own making, such as `sample_keep` on
            global sample ids.
        force_keep: None, or (batch, N) bool, tokens that must go through (a masked loss, inpainting, padded text that
            stands ahead, `torch.arange(N) < lengths[:, None]`); they count among the K.
        score: None, or a function of the stream (batch, N, hidden) that gives (batch, N); the K largest are kept, in
            place of a draw: `lambda x: x.abs().sum(-1)`. No gradient.
        in_eval: False; True routes in evaluation mode too (self-guidance).
    """

    def __init__(
        self,
        start: int,
        end: int,
        blocks: list[nn.Module],
        selection_ratio: float,
        shared: bool,
        score: Callable[[Tensor], Tensor] | None,
        ends: tuple[int, int],
    ) -> None:
        super().__init__(start, end, blocks, shared, score, ends)
        self.selection_ratio = selection_ratio

    @property
    def keep(self) -> Tensor | None:
        return self.now.keep

    @property
    def selection_ratio(self) -> float:
        return float(self._ratio)

    @selection_ratio.setter
    def selection_ratio(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise ValueError(
                "selection_ratio is the share of tokens that bypass the blocks: 0, which is dense, or it lies in "
                f"(0, 1), got {value}"
            )
        self._ratio = repr(float(value))
        self._dense = value == 0

    @property
    def probability(self) -> float:
        return float(self._probability)

    @probability.setter
    def probability(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"probability is the share of forwards that are routed, 0 to 1, got {value}")
        self._probability = repr(float(value))
        self._phased = value < 1

    @property
    def fixed(self) -> Tensor | None:
        return self._fixed

    @fixed.setter
    def fixed(self, keep: Tensor | None) -> None:
        if keep is not None:
            _check_fixed(keep, self.shared)
        self._fixed = keep

    def verify(self, run: Callable[[], Tensor]) -> str:
        """Prove that the route is right: the model dense against all tokens routed in random order.

        Outputs, and gradients of the routed blocks' parameters and of what enters them, must be the same to 1e-4 of the
        largest value of each in float32, 1e-9 in float64; of a gradient below a hundredth of the largest one, to that
        share of the hundredth. What a wrong route does cannot hide: parameters that are zero (adaLN-zero) are random
        meanwhile, dropout is off, and every route that run leads through but this one. The model must also run on half
        of the tokens. Nothing is compiled meanwhile. Take float32 or float64, any small batch of at least 2 samples.

        Args:
            run: calls the model and returns a tensor that depends on all of its output, such as
                `lambda: model(x, t, y)`. Called several times with the same random numbers.

        Returns:
            A sentence that says what was compared, and how far apart it was.

        Raises:
            ValueError: the two differ. The message names the arguments and tensors that have an entry a token, and the
                call to write; if it says "tried", that call was proven right.
            RuntimeError: run gives other values each time, or no routed block ran.
            Any error of the model itself on half of the tokens, where all of them are right.
        """
        return verify.verify(self, run)

    def remove(self) -> None:
        """Make the blocks dense again for good; compile what was compiled with the route anew."""
        for block in self._blocks:
            stops = block.__dict__["_routes"]
            block.__dict__["_routes"] = tuple(stop for stop in stops if stop.route is not self)
            if not block._routes:
                if "_own_forward" not in vars(type(block)):
                    raise RuntimeError(f"{type(block).__name__} became another class after it was routed (fully_shard)")
                block.__class__ = type(block).__mro__[1]
                del block._routes
        self._blocks = []

    def __repr__(self) -> str:
        return f"Route(blocks {self.start} to {self.end}, selection_ratio={self.selection_ratio})"


def _check_fixed(keep: Tensor, shared: bool) -> None:
    """Refuse what no set of tokens is; values are looked at where that waits for no device."""
    if keep.ndim != 2 or keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise ValueError(f"route.fixed must be (batch, K) integers, got {keep.dtype} of shape {tuple(keep.shape)}")
    if keep.device.type == "cpu" and keep.numel():
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= 2**31:
            raise ValueError(f"route.fixed names tokens by number, 0 to 2^31 - 1, got {low if low < 0 else high}")
        if bool((keep.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("route.fixed names a token twice in a row: kept tokens are unique in a sample")
        if shared and bool((keep != keep[:1]).any()):
            raise ValueError("route.fixed has rows that differ, but shared=True keeps the same tokens in every sample")
