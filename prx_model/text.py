"""Text towers: captions in, embeddings and a padding mask out.

`ByteTower` is small and trained with the denoiser; `T5GemmaTower` is the frozen encoder of the recipe. Both have
`tokenize(captions) -> ids, mask` (host) and `forward(ids, mask) -> (batch, L, width)`; the frozen one also has
`encode(captions)`, which costs what real tokens cost.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Token ids of ByT5 (https://arxiv.org/abs/2105.13626): pad 0, end 1, unknown 2, then the 256 bytes; 125 sentinels.
PAD, END, FIRST_BYTE, VOCABULARY = 0, 1, 3, 384
# Relative position buckets of T5 (https://arxiv.org/abs/1910.10683, section 2.1).
BUCKETS, MAX_DISTANCE = 32, 128
NORM_EPS = 1e-6
# Where the byte tower's heads look at first: bytes nearby, so that words are seen from the start and tokens do not mix.
# One run each of 600 steps on `shapes`: 0.34 of the backgrounds right with T5's small random bias (4 heads, depth 2),
# 1.00 with a first form of this (bias 4 on 6 of 8 heads, depth 1). Three bytes each way stay within a word: with
# offsets down to -6, where "white circle" becomes one feature, a seed drew 0.48 instead of 0.72 of the colour and shape
# pairs that never met in training (weight decay 0.3, 1,700 steps).
LOCAL_OFFSETS, LOCAL_BIAS = (-1, -2, 1, 2, -3, 3, 0, -1), 8.0

# Shapes in which frozen captions are encoded: so many at a time, padded to a multiple of so many tokens. Part of what
# embeddings are, bit for bit: other shapes round otherwise.
GROUP, LENGTH_STEP = 4, 32
# What transformers takes where nothing is said. Said, since a folder's config.json may name a kernel on the hub.
ATTENTION = "eager"


def _written(caption: str) -> str:
    """The caption with "?" for each half of a surrogate pair: JSON can say those, and no encoding can write them."""
    return caption.encode(errors="replace").decode()


class ByteTower(nn.Module):
    """Byte-level encoder of the T5 v1.1 form with ByT5's tokens; small, trained with the denoiser.

    `convert.byte_tower_to_t5` turns its weights into those of transformers' `T5EncoderModel`, so exported pipelines
    need no code of ours.

    Args:
        width: embedding width, the denoiser's `context_in_dim`.
        depth: blocks.
        num_heads: heads of width / num_heads features.
        max_tokens: longest caption in bytes, the end token included; longer ones are cut.

    Raises:
        ValueError: a width that is no multiple of num_heads.
    """

    def __init__(self, width: int = 128, depth: int = 2, num_heads: int = 8, max_tokens: int = 96) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"text.width {width} must be a multiple of text.num_heads {num_heads}")
        self.width, self.num_heads, self.max_tokens = width, num_heads, max_tokens
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.relative_bias = nn.Embedding(BUCKETS, num_heads)
        self.blocks = nn.ModuleList(_ByteBlock(width, num_heads) for _ in range(depth))
        self.final_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill the weights with `initial_weights`."""
        for name, value in self.initial_weights(generator):
            self.get_parameter(name).copy_(value)

    @torch.no_grad()
    def initial_weights(self, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
        """T5's initialisation (unit embeddings, linear maps of variance 1/fan-in), and heads turned to nearby bytes.

        Yields (name, value), float32, one at a time and in a fixed order: a sharded tower takes its part of each.
        """
        yield "embedding.weight", nn.init.normal_(torch.empty(VOCABULARY, self.width), generator=generator)
        bias = nn.init.normal_(torch.empty(BUCKETS, self.num_heads), std=self.width**-0.5, generator=generator)
        # On the CPU, whatever the weights are on: on the meta device a bucket would have no value to index by.
        bucket = _buckets(2 * MAX_DISTANCE, torch.device("cpu"))[MAX_DISTANCE].tolist()
        for head in range(self.num_heads):
            offset = LOCAL_OFFSETS[head % len(LOCAL_OFFSETS)]
            bias[bucket[MAX_DISTANCE + offset], head] += LOCAL_BIAS
        yield "relative_bias.weight", bias
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                weight = nn.init.normal_(torch.empty(module.weight.shape), std=std, generator=generator)
                # Scores are not scaled, so the queries are.
                yield f"{name}.weight", weight.mul_((self.width // self.num_heads) ** -0.5 if name[-2:] == ".q" else 1)
            elif isinstance(module, nn.RMSNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """UTF-8 bytes and an end token, padded on the right to the longest: ids and mask, (batch, L) int64 and bool."""
        rows = [[FIRST_BYTE + b for b in _written(c).encode()[: self.max_tokens - 1]] + [END] for c in captions]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64)
        return ids, ids != PAD

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode (batch, L) ids with their bool mask: (batch, L, width); rows of padding hold no meaning."""
        x = self.embedding(ids)
        bias = self.relative_bias(_buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None]
        bias = bias.masked_fill(~mask[:, None, None, :], float("-inf"))
        for block in self.blocks:
            x = block(x, bias)
        out: Tensor = self.final_norm(x)
        return out


class _ByteBlock(nn.Module):
    """Pre-norm attention (unscaled scores, relative bias) and gated tanh-GELU MLP, without biases: T5 v1.1."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_mlp = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (part(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


def _buckets(length: int, device: torch.device) -> Tensor:
    """Bucket of each (query, key) pair: distances exact below 8, then logarithmic; keys ahead in the upper half."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    scaled = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + scaled.to(torch.int64)).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def load_tokenizer(name: str, *, revision: str | None = None, local_files_only: bool = False) -> Any:
    """The tokenizer of a hub model or a folder, by transformers' own classes: nothing that lies there is run.

    Raises:
        OSError, ValueError: not there, or one that needs code of its own.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=False, local_files_only=local_files_only
    )


class T5GemmaTower(nn.Module):
    """Frozen T5Gemma encoder (https://arxiv.org/abs/2504.06225), `google/t5gemma-2b-2b-ul2` in the recipe.

    Only the encoder's weights are kept. Needs the extra `model` (transformers).

    Args:
        name: hub name or a local folder.
        revision: hub revision; part of what identifies embeddings.
        max_tokens: captions are cut and padded to this length, on the right.
        dtype: of weights and embeddings.

    Raises:
        ValueError: weights or tokenizer that are not there, or that do not fill the encoder; the message says what
            was looked for.
    """

    def __init__(
        self,
        name: str = "google/t5gemma-2b-2b-ul2",
        *,
        revision: str | None = None,
        max_tokens: int = 256,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        from safetensors import SafetensorError
        from transformers import AutoConfig, T5GemmaEncoderModel

        self.max_tokens = max_tokens
        local = Path(name).exists()
        if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise ValueError(f"there is no folder {name!r} to load T5Gemma from; give text.name one, or a hub name")
        try:
            kind = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).model_type
            if kind != "t5gemma":  # transformers would go on, with a full-size encoder of random weights
                raise ValueError(f"its config.json says model_type {kind!r} where 't5gemma' is needed")
            self.tokenizer = load_tokenizer(name, revision=revision)
            model, info = T5GemmaEncoderModel.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=ATTENTION,
                dtype=dtype,
                is_encoder_decoder=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            where = "folder" if local else "hub model"
            reason = str(error).strip().splitlines()[0].rstrip(".")
            if "trust_remote_code" in str(error):  # transformers' advice is to run it
                reason = "it needs code of its own (auto_map), which is never run"
            raise ValueError(
                f"T5Gemma could not be loaded from the {where} {name!r}: {reason}; give text.name a folder with "
                "config.json, model.safetensors and the tokenizer, or a hub name you have access to"
            ) from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{name!r} lacks {len(missing)} encoder weights, first {missing[0]!r}: not a T5Gemma encoder"
            )
        self.encoder = model.eval().requires_grad_(False)
        self.width: int = model.encoder.config.hidden_size
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"

    def train(self, mode: bool = True) -> "T5GemmaTower":
        """Stay in evaluation mode, whatever holds this tower: frozen means no dropout too."""
        return super().train(False)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (batch, max_tokens) int64 and bool, padded on the right."""
        tokens = self.tokenizer(
            [_written(c) for c in captions],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"].bool()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Embeddings of the captions' real tokens behind one another, and how many each has.

        Captions of like length are encoded `GROUP` at a time, each group padded to a multiple of `LENGTH_STEP` tokens;
        a group that is not full is filled up, and a caption given twice is encoded once. So every product has one of a
        few fixed shapes, whatever the batch, and a caption's embedding does not depend on the others, bit for bit,
        where a kernel treats all rows of a product alike. Autocast around the call changes nothing.

        Returns:
            (sum of lengths, width) in the tower's dtype, on its device; lengths at most `max_tokens`.
        """
        device = next(self.parameters()).device
        distinct = list(dict.fromkeys(captions))
        texts = [_written(c) for c in distinct]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"] if distinct else []
        encoded: dict[str, Tensor] = {}
        buckets: dict[int, list[int]] = {}
        for index, ids in enumerate(tokens):
            buckets.setdefault(min(-(-max(len(ids), 1) // LENGTH_STEP) * LENGTH_STEP, self.max_tokens), []).append(
                index
            )
        for length, members in sorted(buckets.items()):
            for first in range(0, len(members), GROUP):
                group = members[first : first + GROUP]
                rows = [tokens[index] for index in (group + group[:1] * GROUP)[:GROUP]]
                ids, mask = (x.to(device, non_blocking=True) for x in self._padded(rows, length))
                with torch.autocast(device.type, enabled=False):
                    out = self(ids, mask)
                encoded |= {distinct[index]: out[i, : len(tokens[index])] for i, index in enumerate(group)}
        if not distinct:
            return torch.empty(0, self.width, device=device, dtype=next(self.parameters()).dtype), []
        return torch.cat([encoded[c] for c in captions]), [encoded[c].shape[0] for c in captions]

    def _padded(self, rows: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
        """Token ids (rows, length), padded on the right, and their mask."""
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        return ids, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden state (batch, L, width) in the tower's dtype."""
        out: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return out
