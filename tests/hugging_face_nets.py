"""Tiny models of Hugging Face with random weights, and batches as collators yield."""

from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TOKENS, LENGTH = 32, 10


def llama() -> LlamaForCausalLM:
    """Two layers, grouped-query attention, tied embeddings."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            initializer_range=0.5,
        )
    ).eval()


def bert(kind=BertForSequenceClassification):
    """Two layers."""
    torch.manual_seed(0)
    return kind(
        BertConfig(
            vocab_size=TOKENS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.5,
        )
    ).eval()


def masked_bert() -> BertForMaskedLM:
    """As `bert`, with tied embeddings and logits for every position."""
    return bert(BertForMaskedLM)


def batches(
    labels: str | None = None, count: int = 4, padding: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Sequences of 6 to 10 tokens, filled up with ``padding``.

    Args:
        labels: ``"tokens"`` for −100 where padding is, ``"class"`` for one of two.
        count: Batches of 8.
        padding: What token stands where the mask is 0.
    """
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        tokens = torch.randint(TOKENS, (8, LENGTH), generator=generator)
        lengths = torch.randint(6, LENGTH + 1, (8, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        batch = {
            "input_ids": torch.where(mask > 0, tokens, padding),
            "attention_mask": mask,
        }
        if labels == "tokens":
            batch["labels"] = torch.where(mask > 0, tokens, -100)
        if labels == "class":
            batch["labels"] = tokens[:, 0] % 2
        made.append(batch)
    return made


WORDS = ["good", "bad", "very", "film", "plot", "dull", "fun", "and", "not", "so"]


def save_folder(folder: Path, model: PreTrainedModel) -> Path:
    """Save a model with a tokenizer that knows a few words, and return the folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    known = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    known.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_sentences(folder: Path, count: int = 60) -> Path:
    """Write train.tsv and dev.tsv with sentences of 2 to 8 words, good ones or not."""
    folder.mkdir(exist_ok=True)
    random = Random(0)
    for name, rows in (("train.tsv", count), ("dev.tsv", 24)):
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            words = random.choices(WORDS, k=random.randint(2, 8))
            lines.append(f"{' '.join(words)} \t{int('good' in words)}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def save_tokens(path: Path, count: int = 32) -> Path:
    """Write sequences of tokens."""
    random = np.random.default_rng(0)
    np.save(path, random.integers(0, TOKENS, (count, LENGTH)).astype(np.uint16))
    return path
