"""Data: batches, the embedded digits, CIFAR-10 from a folder."""

from fitcompress.data.batches import Batches, split_batch, take
from fitcompress.data.dataset import DATASETS, Dataset, load_dataset

__all__ = ["DATASETS", "Batches", "Dataset", "load_dataset", "split_batch", "take"]
