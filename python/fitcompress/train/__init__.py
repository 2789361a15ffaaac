"""Score and fine-tune compressed models."""

from fitcompress.train.evaluation import Score, divergence, evaluate
from fitcompress.train.finetuning import finetune

__all__ = ["Score", "divergence", "evaluate", "finetune"]
