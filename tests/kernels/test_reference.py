"""The plain-PyTorch definitions: Philox, normals, kept tokens, patches. Kernels are tested against these."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prx_kernels
from prx_kernels import (
    exit_route,
    kept_tokens,
    patchify,
    philox_normal,
    sample_keep,
    scatter_tokens,
    unpatchify,
    x_prediction_loss,
)
from prx_kernels.reference import philox_uint32, uniform_from_uint32
from tests.test_imports import OPS

ALL_ONES = 2**32 - 1
# Kolmogorov-Smirnov and chi-square are held to what happens once in 1,000 draws; the seeds are fixed.
KS = 1.95


def as_int64(unsigned: int) -> int:
    """The int64 with the same 64 bits."""
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def philox_by_hand(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 in Python's own integers (Salmon et al., SC 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & ALL_ONES, (left >> 32) ^ c[3] ^ k[1], left & ALL_ONES]
        k = [(k[0] + 0x9E3779B9) & ALL_ONES, (k[1] + 0xBB67AE85) & ALL_ONES]
    return c


def block(seed: int, sample: int, number: int) -> list[int]:
    """The four words that the docstring of `philox_uint32` promises for block `number` of a sample."""
    return philox_by_hand(
        (number, 0, sample & ALL_ONES, (sample >> 32) & ALL_ONES), (seed & ALL_ONES, (seed >> 32) & ALL_ONES)
    )


def stream(seed: int, samples: list[int], count: int) -> Tensor:
    return philox_uint32(torch.tensor(seed), torch.tensor(samples), count)


# --- Philox -------------------------------------------------------------------------------------------------------


def test_philox_by_hand_gives_random123_s_known_answers() -> None:
    """Random123's kat_vectors, philox4x32 with 10 rounds: so that what we compare with is Philox."""
    answers = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), words in answers.items():
        assert philox_by_hand(counter, key) == [int(w, 16) for w in words.split()]


def test_philox_of_seed_zero_and_sample_zero_is_the_known_answer() -> None:
    assert stream(0, [0], 4).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), as_int64(0x299F31D0A4093822)])
def test_words_follow_the_documented_counter_for_any_64_bits_of_seed_and_id(seed: int) -> None:
    samples = [0, 1, ALL_ONES, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63)]
    words = stream(seed, samples, 11)
    assert words.shape == (8, 11)
    assert words.dtype == torch.int64
    for row, sample in zip(words.tolist(), samples, strict=True):
        assert row == [word for number in range(3) for word in block(seed, sample, number)][:11]


def test_the_word_at_a_far_place_is_that_of_its_own_block() -> None:
    count = 200_003
    assert stream(5, [9], count)[0, -3:].tolist() == block(5, 9, 50_000)[:3]


def test_words_do_not_depend_on_count_batch_or_dtype_of_the_ids() -> None:
    whole = stream(3, list(range(10)), 16)
    assert torch.equal(stream(3, list(range(10)), 5), whole[:, :5])
    assert torch.equal(stream(3, [7, 2, 7], 16), whole[[7, 2, 7]])
    seed = torch.tensor([3], dtype=torch.int32)
    for ids in (torch.tensor([7, 2, -1]), torch.tensor([7, 2, -1], dtype=torch.int32)):
        assert torch.equal(philox_uint32(seed, ids, 16), stream(3, [7, 2, -1], 16))


def test_uniform_lies_strictly_within_zero_and_one_and_is_exact() -> None:
    ends = uniform_from_uint32(torch.tensor([0, ALL_ONES, 2**31, 511, 512]))
    assert ends.dtype == torch.float32
    assert ends.double().tolist() == [2.0**-24, 1 - 2.0**-24, 0.5 + 2.0**-24, 2.0**-24, 1.5 * 2.0**-23]


def test_words_are_uniform_and_their_bits_fair() -> None:
    words = stream(11, list(range(64)), 4096).flatten()
    n = words.numel()
    counts = torch.bincount(words >> 24, minlength=256).double()
    chi = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert chi < 330.5  # 99.9 % of chi-square with 255 degrees of freedom
    for bit in range(32):
        assert abs(float(((words >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)  # 5 standard errors


# --- normals ------------------------------------------------------------------------------------------------------


def test_normals_are_standard_normal() -> None:
    x = philox_normal(torch.tensor(7), (50, 4, 1001)).double().flatten()
    n = x.numel()
    # Five standard errors of each moment: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    for power, (moment, deviation) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(float(x.pow(power).mean()) - moment) < 5 * math.sqrt(deviation / n), power
    cdf = torch.special.ndtr(x.sort().values)
    upper = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float(torch.maximum((upper - cdf).abs(), (upper - 1 / n - cdf).abs()).max()) < KS / math.sqrt(n)


def test_normals_follow_box_muller_on_pairs_of_words() -> None:
    got = philox_normal(torch.tensor(5), (2, 3, 3), sample_ids=torch.tensor([4, 2**33])).double()
    words = stream(5, [4, 2**33], 10)
    u = (torch.div(words, 512, rounding_mode="floor").double() + 0.5) / 2**23
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :9]
    # Angle and radius up to 6 in float32: some units of 2.4e-7, times each other.
    torch.testing.assert_close(got, expected.reshape(2, 3, 3), rtol=0, atol=3e-6)


def test_normals_of_samples_and_seeds_are_independent() -> None:
    n = 20_000
    rows = [philox_normal(torch.tensor(s), (3, n), sample_ids=torch.tensor([0, 1, 2**32])) for s in (0, 1, 2**32, -1)]
    x = torch.cat(rows).double()
    for moments in (x, x.square(), x.abs()):
        correlation = torch.corrcoef(moments) - torch.eye(12, dtype=torch.float64)
        assert float(correlation.abs().max()) < 5 / math.sqrt(n)  # five standard errors, 66 pairs
    halves = torch.corrcoef(torch.stack((x[:, 0::2].flatten(), x[:, 1::2].flatten())))[0, 1]
    assert abs(float(halves)) < 5 / math.sqrt(6 * n)


def test_normals_are_bitwise_the_same_in_any_batch() -> None:
    """At odd sizes too: what a CPU does in vectors and what it does in the rest must agree."""
    seed, ids = torch.tensor(1), torch.arange(100, 137)
    for shape in ((1,), (3, 5, 7), (1000,)):
        together = philox_normal(seed, (37, *shape), sample_ids=ids)
        alone = [philox_normal(seed, (1, *shape), sample_ids=ids[i : i + 1]) for i in range(37)]
        assert torch.equal(together, torch.cat(alone))
        assert together.dtype == torch.float32


def test_normals_are_finite_at_the_smallest_and_the_largest_word(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, 0, ALL_ONES, ALL_ONES, 0, ALL_ONES]])
    monkeypatch.setattr("prx_kernels.noise.reference.philox_uint32", lambda *_: extremes)
    x = philox_normal(torch.tensor(0), (1, 6))
    assert torch.isfinite(x).all()
    # The largest radius is sqrt(-2 ln 2^-24) = 5.768.
    assert float(x.abs().max()) == pytest.approx(math.sqrt(48 * math.log(2)), abs=1e-5)


def test_sample_ids_count_from_zero_unless_given_and_must_match_the_batch() -> None:
    seed = torch.tensor(1)
    assert torch.equal(philox_normal(seed, (3, 4)), philox_normal(seed, (3, 4), sample_ids=torch.arange(3)))
    with pytest.raises(ValueError, match=r"sample_ids must have shape \(3,\) to match shape \(3, 4\), got \(2,\)"):
        philox_normal(seed, (3, 4), sample_ids=torch.arange(2))


# --- kept tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [
        (256, 0.5, 128),
        (1024, 0.5, 512),
        (10, 0.3, 7),
        (2, 0.5, 1),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (9, 0.001, 8),
        (9, 0.999, 1),
    ],
)
def test_kept_tokens_follow_the_rule_and_are_never_none_or_all(tokens: int, ratio: float, kept: int) -> None:
    assert kept_tokens(tokens, ratio) == kept


@pytest.mark.parametrize(
    ("tokens", "ratio", "message"),
    [
        (1, 0.5, "at least 2 tokens, got 1"),
        (16, 0.0, r"lies in \(0, 1\), got 0.0"),
        (16, 1.0, r"lies in \(0, 1\), got 1.0"),
        (16, float("nan"), r"lies in \(0, 1\), got nan"),
    ],
)
def test_impossible_routing_is_refused(tokens: int, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_tokens(tokens, ratio)
    with pytest.raises(ValueError, match=message):
        sample_keep(torch.arange(2), tokens, ratio, seed=torch.tensor(0))


def test_kept_tokens_are_sorted_unique_and_those_of_the_smallest_words() -> None:
    keep = sample_keep(torch.arange(100), 37, 0.4, seed=torch.tensor(2))
    assert keep.shape == (100, 22)
    assert keep.dtype == torch.int32
    assert (keep.diff(dim=1) > 0).all()
    assert int(keep.min()) >= 0
    assert int(keep.max()) <= 36
    words = stream(2, list(range(100)), 37)
    for row, word in zip(keep.tolist(), words.tolist(), strict=True):
        assert row == sorted(sorted(range(37), key=word.__getitem__)[:22])


def test_every_token_and_every_pair_is_kept_equally_often() -> None:
    draws, tokens = 20_000, 8
    keep = sample_keep(torch.arange(draws), tokens, 0.5, seed=torch.tensor(3)).long()
    hot = F.one_hot(keep, tokens).sum(dim=1).double()
    single, pairs = hot.sum(dim=0), (hot.T @ hot)[torch.triu_indices(8, 8, 1).unbind()]
    # Shares 1/2 and 4·3/(8·7), each within four standard errors.
    assert float((single / draws - 0.5).abs().max()) < 4 * math.sqrt(0.25 / draws)
    assert float((pairs / draws - 3 / 14).abs().max()) < 4 * math.sqrt(3 / 14 * 11 / 14 / draws)
    sets = torch.bincount((2**keep).sum(dim=1), minlength=256)
    counts = sets[sets > 0].double()
    assert counts.numel() == math.comb(8, 4)
    # 99.9 % of chi-square with 69 degrees of freedom.
    assert float(((counts - draws / 70) ** 2 / (draws / 70)).sum()) < 111.1


def test_kept_tokens_depend_on_seed_and_id_only() -> None:
    def keep(ids: list[int], seed: int) -> Tensor:
        return sample_keep(torch.tensor(ids), 64, 0.5, seed=torch.tensor(seed))

    whole = keep(list(range(20)), 5)
    assert torch.equal(keep([13, 4, 13], 5), whole[[13, 4, 13]])
    assert len({tuple(row) for row in whole.tolist()}) == 20
    assert not torch.equal(keep(list(range(20)), 6), whole)
    assert not torch.equal(keep([2**32 + 1], 5), whole[1:2])


# --- patches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 2), (2, 4, 10), (8, 16, 8), (32, 64, 96)])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_patches_equal_torch_unfold_and_go_back_exactly(patch: int, height: int, width: int, channels: int) -> None:
    image = torch.randn(2, channels, height, width)
    tokens = patchify(image, patch)
    assert torch.equal(tokens, F.unfold(image, patch, stride=patch).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, patch, height, width), image)


def test_a_patch_holds_its_pixels_in_the_order_channel_row_column() -> None:
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(image, 2)
    for b, c, row, column in ((0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 3)):
        token, feature = (row // 2) * 3 + column // 2, c * 4 + (row % 2) * 2 + column % 2
        assert tokens[b, token, feature] == image[b, c, row, column]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_patches_keep_the_dtype(dtype: torch.dtype) -> None:
    image = torch.ones(1, 3, 4, 4, dtype=dtype)
    assert patchify(image, 2).dtype == unpatchify(patchify(image, 2), 2, 4, 4).dtype == dtype


def test_patches_pass_gradients_straight_through() -> None:
    image = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    (unpatchify(patchify(image, 2), 2, 4, 6) * weight).sum().backward()
    assert torch.equal(image.grad, weight)  # type: ignore[arg-type]


IMAGE = torch.zeros(2, 3, 4, 6)
TOKENS = torch.zeros(2, 6, 12)
T = torch.ones(2)
BAD: dict[str, tuple[Any, str]] = {
    "patchify height": (lambda: patchify(torch.zeros(1, 3, 5, 4), 2), "5x4 is not a multiple of the patch size 2; 4x4"),
    "patchify small": (lambda: patchify(torch.zeros(1, 3, 4, 1), 2), "4x1 is not a multiple .* 4x2 would be"),
    "unpatchify width": (lambda: unpatchify(TOKENS, 2, 4, 7), "4x7 is not a multiple of the patch size 2"),
    "unpatchify count": (lambda: unpatchify(TOKENS, 2, 4, 4), r"4x4 .* needs 4 tokens .* got \(6, 12\)"),
    "unpatchify features": (lambda: unpatchify(torch.zeros(2, 6, 13), 2, 4, 6), r"got \(6, 13\)"),
    "loss size": (lambda: x_prediction_loss(TOKENS, torch.zeros(2, 3, 4, 7), T, 2), "4x7 is not a multiple"),
    "loss tokens": (lambda: x_prediction_loss(TOKENS[:, :5], IMAGE, T, 2), r"tokens must be \(2, 6, 12\)"),
    "loss batch": (lambda: x_prediction_loss(TOKENS[:1], IMAGE, T, 2), r"tokens must be \(2, 6, 12\)"),
    "loss t": (lambda: x_prediction_loss(TOKENS, IMAGE, T[:1], 2), r"t \(2,\), got .* and \(1,\)"),
    "loss reduction": (lambda: x_prediction_loss(TOKENS, IMAGE, T, 2, reduction="sum"), "got 'sum'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("join", [exit_route, lambda y, x, keep: scatter_tokens(x, y, keep)], ids=["exit", "scatter"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 4), (1, 2, 4), (2, 2, 5), (2, 2, 3)])
def test_rows_that_do_not_match_keep_are_refused(join: Any, shape: tuple[int, ...]) -> None:
    """torch.scatter takes a source that is too large, and would drop the rest without a word."""
    with pytest.raises(ValueError, match=r"\(2, 2, 4\)"):
        join(torch.ones(shape), torch.zeros(2, 6, 4), torch.tensor([[0, 2], [1, 5]]))


def test_every_public_name_exists_and_the_list_is_sorted() -> None:
    assert prx_kernels.__all__ == sorted(prx_kernels.__all__)
    assert all(hasattr(prx_kernels, name) for name in prx_kernels.__all__)


def test_the_package_hands_on_the_public_names_of_every_op_and_no_others() -> None:
    folders = [importlib.import_module(f"prx_kernels.{op}") for op in OPS]
    handed = {name: getattr(folder, name) for folder in folders for name in folder.__all__}
    assert {name: getattr(prx_kernels, name) for name in prx_kernels.__all__} == handed


def test_the_reference_hands_on_the_definitions_of_every_op() -> None:
    assert prx_kernels.reference.__all__ == sorted(prx_kernels.reference.__all__)
    for op in OPS:
        module = importlib.import_module(f"prx_kernels.{op}.reference")
        public = {name for name in vars(module) if not name.startswith("_")}
        defined = {name for name in public if getattr(getattr(module, name), "__module__", "") == module.__name__}
        assert defined, op
        assert defined <= set(prx_kernels.reference.__all__)
        assert all(getattr(module, name) is getattr(prx_kernels.reference, name) for name in defined)
