"""Tiny models of Hugging Face with random weights, and batches as collators yield."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
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
