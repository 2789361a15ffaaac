"""Compressed models under the Trainer of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import fitcompress as fc
from fitcompress.hugging_face import KeepSize
from fitcompress.quantize import grid_of
from hugging_face_nets import batches, bert, llama


class Kill(TrainerCallback):
    """Stops at a checkpoint, as a kill right after it does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_save(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def samples(labels: str) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value[i] for key, value in batch.items()}
        for batch in batches(labels, 4)
        for i in range(8)
    ]


def packed(make, labels: str, folder: Path) -> Path:
    net = make()
    small = fc.compress(net, batches(labels), fc.Budget(size="45%"), progress=False)
    fc.save(small, folder / "start")
    return folder / "start"


def trained(
    make, labels: str, start: Path, out: Path, *, kill=None, resume=False, size=None
):
    """Train from a packed file, and return the bytes of the outcome."""
    small = fc.load(start, make(), trainable=True)
    keep = KeepSize(small, size)
    trainer = Trainer(
        small,
        TrainingArguments(
            str(out),
            per_device_train_batch_size=8,
            num_train_epochs=10,
            save_steps=10,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=samples(labels),
        callbacks=[keep, Kill(kill)],
        optimizers=(keep.optimizer(0.02), None),
    )
    if kill is not None:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return b"", small
    trainer.train(resume_from_checkpoint=resume)
    fc.save(small, out / "packed")
    return (out / "packed").read_bytes(), small


@pytest.mark.parametrize(("make", "labels"), [(llama, "tokens"), (bert, "class")])
def test_a_killed_run_ends_with_the_same_file(tmp_path, make, labels) -> None:
    start = packed(make, labels, tmp_path)
    whole, small = trained(make, labels, start, tmp_path / "whole")
    trained(make, labels, start, tmp_path / "killed", kill=30)
    resumed, _ = trained(make, labels, start, tmp_path / "killed", resume=True)
    assert resumed == whole
    assert whole != start.read_bytes()
    assert len(whole) <= start.stat().st_size * 1.01
    limit = fc.PackedFile(start).plan.limit_bytes
    assert len(whole) <= limit
    assert not small.training
    if make is llama:
        assert torch.equal(small.lm_head.weight, small.model.embed_tokens.weight)
        assert grid_of(small.lm_head) is grid_of(small.model.embed_tokens)
    loss = [
        fc.evaluate(model, batches(labels), progress=False).loss
        for model in (fc.load(start, make()), small)
    ]
    assert loss[1] < loss[0]


def test_what_is_squeezed_too_far_is_said(tmp_path) -> None:
    start = packed(bert, "class", tmp_path)
    with pytest.raises(fc.errors.BudgetExceededError, match="squeezed"):
        trained(bert, "class", start, tmp_path / "out", size=2000)


def test_only_compressed_models_have_a_size_to_keep() -> None:
    with pytest.raises(fc.errors.PlanMismatchError):
        KeepSize(bert())
