"""A classifier of BERT's shape (Devlin et al. 2018, arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["BertEncoder"]


class Block(nn.Module):
    """Self-attention and a feed-forward network, norms after the residual sums."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output [B, T, width]."""
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.output(mixed))
        y: torch.Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


class BertEncoder(nn.Module):
    """Token and position embeddings, blocks, a pooled classifier; no padding.

    Args:
        classes: Number of classes.
        width: Length of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        tokens: Size of the vocabulary.
        length: Longest sequence.
    """

    def __init__(
        self,
        classes: int = 2,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        tokens: int = 30522,
        length: int = 512,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width) for _ in range(depth)
        )
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes] of tokens [B, T]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.token(tokens) + self.position(places.expand_as(tokens)))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.classifier(self.pooler(x[:, 0]).tanh())
        return logits
