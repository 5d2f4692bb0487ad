"""Text towers: the byte tower against transformers' ByT5 tokens and T5 encoder, and T5Gemma loaded from a folder."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prx_model import ByteTower, T5GemmaTower
from prx_model.convert import byte_tower_to_t5
from tests.model.tiny_t5gemma import save_t5gemma, save_tokenizer

CAPTIONS = [
    "a red circle on a blue background, top left",
    "",
    "Un café déjà vu, naïve — señor Ångström",
    "🦊 fox 日本語 👩\u200d🚀",
    "  spaces,\ttabs\nand lines  ",
    "x" * 300,
]


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [8, 96, 400])
def test_byte_tokens_equal_transformers_byt5_tokenizer(max_tokens: int) -> None:
    from transformers import ByT5Tokenizer

    ids, mask = ByteTower(width=8, depth=1, num_heads=2, max_tokens=max_tokens).tokenize(CAPTIONS)
    theirs = ByT5Tokenizer()(CAPTIONS, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask, theirs["attention_mask"].bool())


def test_an_empty_caption_is_its_end_token_alone() -> None:
    ids, mask = ByteTower(width=8, depth=1, num_heads=2).tokenize([""])
    assert ids.tolist() == [[1]]
    assert mask.tolist() == [[True]]


def make_byte_tower() -> ByteTower:
    tower = ByteTower(width=32, depth=3, num_heads=4, max_tokens=400)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        tower.relative_bias.weight.normal_(generator=generator)  # of order 1, so that a wrong bucket shows
    return tower


def test_byte_tower_equals_transformers_t5_encoder_with_converted_weights() -> None:
    from transformers import T5Config, T5EncoderModel

    tower = make_byte_tower()
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    theirs = T5EncoderModel(config).eval()
    loaded = theirs.load_state_dict(byte_tower_to_t5(tower.state_dict()), strict=False)
    assert set(loaded.missing_keys) <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    assert not loaded.unexpected_keys
    # 300 bytes and more reach every bucket of distance, the last one (128 and beyond) included.
    ids, mask = tower.tokenize(CAPTIONS)
    assert ids.shape[1] > 256
    with torch.no_grad():
        ours = tower(ids, mask)
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    # Issue 2's tolerance for a foreign model, 1e-5, on outputs of order 1; rows of padding hold no meaning.
    assert expected[mask].std() > 0.5
    torch.testing.assert_close(ours[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_byte_embeddings_do_not_depend_on_padding_or_on_the_other_captions() -> None:
    tower = make_byte_tower()
    together = tower(*tower.tokenize(CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        ids, mask = tower.tokenize([caption])
        assert mask.all()
        alone = tower(ids, mask)
        # Softmax over a longer masked row adds zeros, in another order: float32 rounding.
        torch.testing.assert_close(alone[0], together[i, : ids.shape[1]], rtol=1e-4, atol=1e-5)


def test_every_weight_of_the_byte_tower_learns() -> None:
    tower = make_byte_tower()
    ids, mask = tower.tokenize(CAPTIONS)
    out = tower(ids, mask)
    (out * mask[..., None] * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.norm() > 0, name


def test_byte_tower_initialisation_keeps_embeddings_of_unit_size() -> None:
    tower = ByteTower(width=64, depth=2, num_heads=4)
    tower.init_weights(torch.Generator().manual_seed(0))
    ids, mask = tower.tokenize(CAPTIONS[:4])
    out = tower(ids, mask).detach()
    assert float(out[mask].square().mean()) == pytest.approx(1.0, abs=1e-3)  # RMS norm with unit scale, by definition
    for caption in range(1, 4):
        assert float((out[caption, 0] - out[0, 0]).norm()) > 0.1


def test_byte_tower_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="text.width 30 must be a multiple of text.num_heads 4"):
        ByteTower(width=30, num_heads=4)


# --- T5Gemma ------------------------------------------------------------------------------------------------------

WIDTH, MAX_TOKENS = 32, 12
PROMPTS = ["a red circle", "", "a blue square on a red background, bottom right, and more words than fit into it"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A tiny random T5Gemma, encoder and decoder, saved as the hub's checkpoints are; and the model itself."""
    folder = tmp_path_factory.mktemp("t5gemma")
    return folder, save_t5gemma(folder, WIDTH)


def load(saved: tuple[Path, torch.nn.Module], dtype: torch.dtype = torch.float32) -> T5GemmaTower:
    return T5GemmaTower(str(saved[0]), max_tokens=MAX_TOKENS, dtype=dtype)


def test_t5gemma_tokens_are_cut_and_padded_on_the_right(saved: tuple[Path, torch.nn.Module]) -> None:
    from transformers import AutoTokenizer

    ids, mask = load(saved).tokenize(PROMPTS)
    assert ids.shape == mask.shape == (3, MAX_TOKENS)
    assert mask.dtype == torch.bool
    tokenizer = AutoTokenizer.from_pretrained(saved[0])
    assert tokenizer.padding_side == tokenizer.truncation_side == "left", "else the test shows nothing"
    for i, prompt in enumerate(PROMPTS):
        plain = tokenizer(prompt)["input_ids"][:MAX_TOKENS]
        assert ids[i].tolist() == plain + [0] * (MAX_TOKENS - len(plain))
        assert mask[i].tolist() == [True] * len(plain) + [False] * (MAX_TOKENS - len(plain))
    assert mask.sum(dim=1).tolist()[1:] == [1, MAX_TOKENS]


def test_t5gemma_embeddings_equal_those_of_the_full_model_s_encoder(saved: tuple[Path, torch.nn.Module]) -> None:
    tower, full = load(saved), saved[1]
    ids, mask = tower.tokenize(PROMPTS)
    with torch.no_grad():
        expected = full.model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # type: ignore[union-attr,operator]
    got = tower(ids, mask)
    assert tower.width == WIDTH
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # the same operations on the same weights


def test_t5gemma_embeddings_do_not_depend_on_padding(saved: tuple[Path, torch.nn.Module]) -> None:
    tower = load(saved)
    ids, mask = tower.tokenize(PROMPTS)
    together = tower(ids, mask)
    for i in range(3):
        real = mask[i].sum()
        alone = tower(ids[i : i + 1, :real], mask[i : i + 1, :real])
        # Softmax over fewer keys: float32 rounding.
        torch.testing.assert_close(alone[0], together[i, :real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0, 0], together[2, 0], atol=1e-3), "text must reach the first token"


def test_t5gemma_holds_the_encoder_only_frozen_and_without_a_graph(saved: tuple[Path, torch.nn.Module]) -> None:
    tower, full = load(saved), saved[1]
    encoder = full.model.encoder  # type: ignore[union-attr]
    held = {re.sub(r"^(encoder\.)+", "", name): p for name, p in tower.named_parameters()}
    assert held.keys() == {name for name, _ in encoder.named_parameters()}  # type: ignore[union-attr,operator]
    assert not any(p.requires_grad for p in held.values())
    assert not tower(*tower.tokenize(PROMPTS)).requires_grad


def test_t5gemma_stays_without_dropout_whatever_holds_it(saved: tuple[Path, torch.nn.Module]) -> None:
    tower = load(saved)
    ids, mask = tower.tokenize(PROMPTS)
    before = tower(ids, mask)
    holder = torch.nn.ModuleList([tower]).train()
    assert holder.training
    assert not any(module.training for module in tower.modules())
    assert torch.equal(tower(ids, mask), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5gemma_weights_and_embeddings_have_the_dtype_asked_for(
    saved: tuple[Path, torch.nn.Module], dtype: torch.dtype
) -> None:
    tower = load(saved, dtype)
    assert {p.dtype for p in tower.parameters()} == {dtype}
    out = tower(*tower.tokenize(PROMPTS))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_t5gemma_loads_an_encoder_saved_alone(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    from transformers import T5GemmaEncoderModel

    encoder = T5GemmaEncoderModel.from_pretrained(saved[0], is_encoder_decoder=False)
    encoder.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    both, alone = load(saved), T5GemmaTower(str(tmp_path), max_tokens=MAX_TOKENS, dtype=torch.float32)
    tokens = both.tokenize(PROMPTS)
    assert torch.equal(both(*tokens), alone(*tokens))


# --- T5Gemma: real tokens only ------------------------------------------------------------------------------------

WORDS = [
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "background",
    "top",
    "left",
    "small",
    "large",
    "and",
    "the",
    "of",
]


def many_captions(count: int, longest: int = 90) -> list[str]:
    """Captions of 0 to `longest` words, most of them short."""
    generator = torch.Generator().manual_seed(5)
    lengths = (longest * torch.rand(count, generator=generator) ** 2).int().tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def long_tower(saved: tuple[Path, torch.nn.Module]) -> T5GemmaTower:
    """Captions of up to 128 tokens, in bfloat16."""
    return T5GemmaTower(str(saved[0]), max_tokens=128)


def test_encoding_real_tokens_gives_the_padded_form_s_embeddings(saved: tuple[Path, torch.nn.Module]) -> None:
    tower = T5GemmaTower(str(saved[0]), max_tokens=128, dtype=torch.float32)
    captions = many_captions(21)
    tokens, lengths = tower.encode(captions)
    ids, mask = tower.tokenize(captions)
    padded = tower(ids, mask)
    assert lengths == mask.sum(dim=1).tolist()
    assert min(lengths) < 32 < 96 < max(lengths), "else there is only one group"
    assert tokens.shape == (sum(lengths), WIDTH)
    # Softmax over fewer keys: float32 rounding, as above.
    torch.testing.assert_close(tokens, padded[mask], rtol=1e-4, atol=1e-5)


def test_a_caption_s_embedding_is_the_same_bit_for_bit_in_any_company(long_tower: T5GemmaTower) -> None:
    """So a cache written in one order holds what training encodes in another."""
    captions = [*many_captions(40), *PROMPTS]
    together = dict(zip(captions, parts(*long_tower.encode(captions)), strict=True))
    assert len({len(part) for part in together.values()}) > 10
    for seed in range(6):
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = [captions[i] for i in order[: 1 + 3 * seed]]
        with torch.autocast("cpu", torch.bfloat16):
            for caption, part in zip(batch, parts(*long_tower.encode(batch)), strict=True):
                assert torch.equal(part, together[caption])


def parts(tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return tokens.split(lengths)


def test_encoding_costs_about_what_real_tokens_cost(long_tower: T5GemmaTower, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = many_captions(64)
    shapes: list[tuple[int, ...]] = []
    forward = T5GemmaTower.forward

    def counted(self: T5GemmaTower, ids: Tensor, mask: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, mask)

    monkeypatch.setattr(T5GemmaTower, "forward", counted)
    _, lengths = long_tower.encode([*captions, "", "", captions[0]])  # known captions cost nothing more
    assert set(shapes) <= {(4, 32), (4, 64), (4, 96), (4, 128)}
    computed = sum(rows * length for rows, length in shapes)
    # A group has up to 31 places too many a caption, and each of four lengths up to three captions.
    assert sum(lengths) <= computed < 64 * 31 + 3 * (32 + 64 + 96 + 128) + sum(lengths)
    assert computed < 0.7 * len(captions) * 128  # captions of a third of the longest length, on average


def test_no_caption_and_a_caption_given_twice(long_tower: T5GemmaTower) -> None:
    tokens, lengths = long_tower.encode([])
    assert (tokens.shape, lengths) == ((0, WIDTH), [])
    tokens, lengths = long_tower.encode(["a circle", "", "a circle"])
    assert lengths[0] == lengths[2] > lengths[1] == 1
    assert torch.equal(tokens[: lengths[0]], tokens[-lengths[2] :])


# --- T5Gemma: folders that are wrong ------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_encoded_as_a_question_mark(long_tower: T5GemmaTower) -> None:
    """As a caption cut within an emoji comes out of JSON."""
    half, mark = "a fox \ud83e", "a fox ?"
    encoded, lengths = long_tower.encode([half, mark, "🦊"])
    first, second, _ = parts(encoded, lengths)
    assert torch.equal(first, second)
    for tower in (long_tower, make_byte_tower()):
        ids, mask = tower.tokenize([half, mark])
        assert torch.equal(ids[0], ids[1])
        assert torch.equal(mask[0], mask[1])


def copy_without(source: Path, target: Path, name: str) -> None:
    for path in source.iterdir():
        if path.name != name:
            (target / path.name).write_bytes(path.read_bytes())


def refused(name: str) -> str:
    with pytest.raises(ValueError, match="T5Gemma") as caught:
        T5GemmaTower(name, max_tokens=MAX_TOKENS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/t5gemma", "./nowhere", "../a/b", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_called_a_missing_folder(name: str) -> None:
    assert refused(name).startswith(f"there is no folder {name!r} to load T5Gemma from")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_folder_without_weights_or_config_is_refused(
    saved: tuple[Path, torch.nn.Module], tmp_path: Path, lost: str
) -> None:
    copy_without(saved[0], tmp_path, lost)
    assert str(tmp_path) in refused(str(tmp_path))


def test_truncated_weights_are_refused(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    copy_without(saved[0], tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((saved[0] / "model.safetensors").read_bytes()[:-100])
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "other shape"])
def test_weights_that_do_not_fill_the_encoder_are_refused(
    saved: tuple[Path, torch.nn.Module], tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    copy_without(saved[0], tmp_path, "model.safetensors")
    weights: dict[str, Tensor] = load_file(saved[0] / "model.safetensors")
    name = "model.encoder.layers.1.mlp.up_proj.weight"
    weight = weights.pop(name)
    if damage == "other shape":
        weights[name] = weight[:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(str(tmp_path))
    assert str(tmp_path) in message
    assert damage != "missing" or "lacks 1 encoder weights, first 'encoder.layers.1.mlp.up_proj.weight'" in message


def test_a_folder_of_another_architecture_is_refused_by_its_name(tmp_path: Path) -> None:
    """transformers would build a T5Gemma of the default size, 2 B random weights, and warn."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert "model_type 'bert' where 't5gemma' is needed" in refused(str(tmp_path))
