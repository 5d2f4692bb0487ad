"""A tiny random T5Gemma with a tokenizer trained here, saved as the hub's checkpoints are."""

from pathlib import Path

import torch


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained here, saved as one that pads and cuts on the wrong side."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["a red circle on a blue background", "a blue square, top left"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True)),
        padding_side="left",
        truncation_side="left",
    )
    tokenizer.save_pretrained(folder)


def save_t5gemma(folder: Path, width: int, std: float = 0.2) -> torch.nn.Module:
    """Save encoder, decoder and tokenizer with weights of that deviation; gives the model."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    save_tokenizer(folder)
    module = {
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**module),
        decoder=T5GemmaModuleConfig(**module),
        vocab_size=320,
        dropout_rate=0.3,
    )
    model = T5GemmaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    model.save_pretrained(folder)
    return model
