"""Euler sampling of the flow with classifier-free guidance or self-guidance (docs/recipe.md, "Objective").

Every picture has its own seed, so what is drawn does not depend on the batch it is drawn in.
"""

import torch
from torch import Tensor

from prx_kernels import philox_normal, sample_keep

from .config import Routing, Sampling
from .flow import shift_time, velocity
from .transformer import PRXTransformer

# Streams of one picture's seed: the initial noise, and the kept tokens of each step (added to it).
_NOISE_STREAM = 0x5EED
_KEEP_STREAM = 0x70C35


def time_grid(steps: int, shift: float, kind: str = "diffusers") -> Tensor:
    """Times of the Euler steps, (steps + 1,) float32 from 1 to 0.

    Args:
        steps: how many.
        shift: time shift (`flow.shift_time`).
        kind: "linear" is PRX's own grid, `linspace(1, 0, steps + 1)` shifted. "diffusers" is that of its
            `FlowMatchEulerDiscreteScheduler(shift=shift)` with 1,000 training steps, which exported pipelines use:
            equal steps from 1 to the shifted 1/1000, shifted, and a last 0.
    """
    if kind == "linear":
        return shift_time(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).float()
    lowest = shift_time(torch.tensor(1e-3, dtype=torch.float64), shift).item()
    grid = shift_time(torch.linspace(1.0, lowest, steps, dtype=torch.float64), shift)
    return torch.cat((grid, torch.zeros(1, dtype=torch.float64))).float()


def initial_noise(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise of the pictures with these seeds: (batch, channels, height, width) float32."""
    stream = torch.full((), _NOISE_STREAM, device=seeds.device)  # made there: a copy would wait for the device
    return philox_normal(stream, (seeds.shape[0], channels, height, width), sample_ids=seeds)


@torch.no_grad()
def sample(
    model: PRXTransformer,
    text: Tensor,
    text_mask: Tensor | None = None,
    *,
    height: int,
    width: int,
    seeds: Tensor,
    settings: Sampling | None = None,
    null_text: Tensor | None = None,
    null_mask: Tensor | None = None,
    routing: Routing | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw pictures by Euler steps `x += (t' - t)·v` with `v = (x - x0_hat)/max(t, t_min)`.

    Args:
        model: the denoiser.
        text: (batch, L, width) embeddings; text_mask (batch, L) bool or None.
        height: in pixels, a multiple of the patch.
        width: the same.
        seeds: (batch,) int64, one a picture.
        settings: steps, their times, guidance and its kind; `Sampling()` unless given.
        null_text: (1, L0, width) embedding of the empty prompt, with null_mask (1, L0); for "cfg".
        routing: routed blocks, for "self".
        noise: (batch, channels, height, width) to start from instead of the seeds' noise.

    Returns:
        (batch, channels, height, width) float32, about [-1, 1].

    Raises:
        ValueError: guidance "cfg" without null_text, or "self" without routing.
    """
    settings = settings or Sampling()
    guided = settings.guidance != 1.0
    if guided and settings.guidance_kind == "cfg" and null_text is None:
        raise ValueError("guidance_kind 'cfg' needs null_text, the embedding of the empty prompt")
    if guided and settings.guidance_kind == "self" and routing is None:
        raise ValueError("guidance_kind 'self' needs routing, the blocks that the routed pass bypasses")
    x = initial_noise(seeds, model.config.in_channels, height, width) if noise is None else noise.float()
    x = x * settings.noise_scale
    grid = time_grid(settings.steps, settings.shift, settings.time_grid).to(x.device)
    predict = _Predictor(model, text, text_mask, null_text, null_mask, routing, seeds, settings)
    for step in range(settings.steps):
        t = grid[step : step + 1]
        x = x + (grid[step + 1] - grid[step]) * velocity(x, predict(x, t, step), t, t_min=settings.t_min)
    return x


class _Predictor:
    """x0_hat with guidance; the text of both passes is laid out once for all steps."""

    def __init__(
        self,
        model: PRXTransformer,
        text: Tensor,
        mask: Tensor | None,
        null_text: Tensor | None,
        null_mask: Tensor | None,
        routing: Routing | None,
        seeds: Tensor,
        settings: Sampling,
    ) -> None:
        self.model, self.text, self.mask = model, text, mask
        self.routing, self.seeds, self.settings = routing, seeds, settings
        self.keep: Tensor | None = None
        """Tokens that the routed pass of this step keeps."""
        self.cfg = settings.guidance != 1.0 and settings.guidance_kind == "cfg"
        if self.cfg and null_text is not None:
            self.text, self.mask = _stack_prompts(null_text, null_mask, text, mask)

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        scale = self.settings.guidance
        if self.cfg:
            without, with_text = self.model(torch.cat((x, x)), t, self.text, self.mask).float().chunk(2)
            return without + scale * (with_text - without)
        dense = self.model(x, t, self.text, self.mask).float()
        if scale == 1.0 or self.routing is None:
            return dense
        return self._routed(x, t, step, dense)

    def _routed(self, x: Tensor, t: Tensor, step: int, dense: Tensor) -> Tensor:
        """Self-guidance `routed + s·(dense - routed)` (TREAD)."""
        from prx_kernels import unpatchify

        assert self.routing is not None
        height, width = x.shape[2:]
        if self.keep is None or self.settings.routed_tokens == "each-step":
            self.keep = self._draw_kept(height, width, step)
        route = (self.routing.start, self.routing.end)
        tokens = self.model.forward_tokens(x, t, self.text, self.mask, keep=self.keep, route=route)
        routed = unpatchify(tokens, self.model.config.patch_size, height, width).float()
        return routed + self.settings.guidance * (dense - routed)

    def _draw_kept(self, height: int, width: int, step: int) -> Tensor:
        assert self.routing is not None
        tokens, stream = self.model.config.tokens(height, width), _KEEP_STREAM + step
        seed = torch.full((), stream, device=self.seeds.device)
        return sample_keep(self.seeds, tokens, self.routing.selection_ratio, seed=seed)


def _stack_prompts(
    null_text: Tensor, null_mask: Tensor | None, text: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both prompts of guidance in one batch (empty first), padded to one length: (2·batch, L, width) and its mask."""
    batch = text.shape[0]
    length = max(null_text.shape[1], text.shape[1])
    texts, masks = [], []
    for prompt, real in ((null_text.expand(batch, -1, -1), null_mask), (text, mask)):
        real = torch.ones(prompt.shape[:2], dtype=torch.bool, device=text.device) if real is None else real
        missing = length - prompt.shape[1]
        texts.append(torch.nn.functional.pad(prompt, (0, 0, 0, missing)))
        masks.append(torch.nn.functional.pad(real.expand(batch, -1), (0, missing), value=False))
    return torch.cat(texts), torch.cat(masks)
