"""Pictures that cost a decoder what photographs do, drawn from their spectrum."""

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int, *, fall: float = 1.0, colour: float | None = None) -> Image.Image:
    """An RGB picture of `height` x `width` pixels with random phases and amplitude 1 / frequency^`fall`.

    Args:
        height, width: in pixels.
        seed: of the phases.
        fall: 1 is that of photographs with grain; smoother ones have more.
        colour: how far the three colours differ from one common picture; None draws each by itself.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1

    def plane() -> np.ndarray:
        found = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency**fall).real
        return np.asarray(found / found.std())

    if colour is None:
        planes = [plane() for _ in range(3)]
    else:
        grey = plane()
        planes = [grey + colour * plane() for _ in range(3)]
    return Image.fromarray((128 + 50 * np.stack(planes, axis=-1)).clip(0, 255).astype(np.uint8))
