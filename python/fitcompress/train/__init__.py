"""Score and fine-tune compressed models."""

from fitcompress.train.evaluate import Score, divergence, evaluate
from fitcompress.train.finetune import finetune

__all__ = ["Score", "divergence", "evaluate", "finetune"]
