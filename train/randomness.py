"""Where every random number of a run comes from: (seed, stage, step, sample position, purpose), and nothing else.

So draws are the same after a resume and at another number of ranks (docs/layout.md, "Randomness"). Host-side draws
(which caption, which shape) use numpy's counter-based Philox; device-side draws (noise, t, kept tokens) take the 64-bit
seed made here and the global sample ids to `prx_kernels`, which has a Philox of its own.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, *, purpose: str, stage: int = 0, step: int = 0) -> int:
    """Hash (seed, stage, step, purpose) to an integer in [0, 2^63), fit for an int64 tensor.

    BLAKE2b, so that neighbouring steps and purposes share nothing; stable across Python versions and machines.
    """
    text = f"{seed}/{stage}/{step}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *, purpose: str, position: int) -> np.random.Generator:
    """A fresh numpy generator for one sample: the same for (seed, purpose, position) wherever it is made."""
    return np.random.Generator(np.random.Philox(key=[derive_seed(seed, purpose=purpose), position]))
