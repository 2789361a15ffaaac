"""``compensate_shards``: compression of a decoder that does not fit in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcompress.blockwise.run import Run
from fitcompress.blockwise.skeleton import Skeleton
from fitcompress.compensate.options import Compensation
from fitcompress.errors import BudgetExceededError
from fitcompress.files import check_no_input, check_writable
from fitcompress.sensitivity.shards import Shards
from fitcompress.storage.coded_weight import Coding, check_coding
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os

    from fitcompress.search.plan import Plan

__all__ = ["compensate_shards"]


def compensate_shards(
    folder: str | os.PathLike[str],
    plan: Plan,
    tokens: Any,
    out: str | os.PathLike[str],
    *,
    compensation: Compensation | None = None,
    coding: Coding = "smallest",
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> int:
    """Compress a decoder from its ``.safetensors`` shards, a block at a time.

    What ``apply`` and ``save`` do, for a causal language model of Hugging Face whose
    blocks are those of Llama (Llama, Mistral, Qwen and others): first h +
    o(attention(norm(h))), then h + down(mlp(norm(h))), which is checked. Embeddings are
    rounded; the groups q/k/v, o, gate/up and down of each block compensated in turn,
    then the head if its weight is its own. Hidden states of all tokens lie on
    disk, once of the dense network and once of the compressed one. In memory are, one
    after the other: half a block twice in float32, as it is and compressed, 8 bytes a
    weight; two matrices of the moments of a group's inputs, 8 (columns + 1)² bytes
    each; and the embedding, or the head, in float32 with its codes twice, 12 bytes a
    weight.

    Computes in float32, and moments in float64, whatever the type of the weights.

    Args:
        folder: Of the model: ``config.json`` and ``.safetensors`` files.
        plan: For this model. If it bounds the bytes of the file, all steps are scaled
            by about one factor, the last layers by what then is left. Fixed-point
            grids have no step to scale: a file that clearly exceeds the limit is
            refused before work starts, one that exceeds it by little at the end.
        tokens: Calibration tokens, integers [sequences, length], without padding.
        out: The packed file, as ``save`` writes it.
        compensation: What compensation does; None for the defaults. γ is always
            cross-validated, unless it is given; ``widen`` has no effect.
        coding: As for ``save``.
        work: Folder for hidden states and finished layers, removed at the end
            unless it was there before; None: ``out`` with ``.work`` behind it. About
            4 · tokens · (3 · width + the inner width of the mlp) bytes at the least; a
            killed run goes on from its last finished group and ends with the same
            bytes.
        progress: Show a bar with the time left.

    Returns:
        The size of the file in bytes.

    Raises:
        FileNotFoundError: There is no such folder.
        MissingDependencyError: transformers is not installed.
        FormatError: Config or files are damaged, or do not fit each other.
        UnsupportedLayerError: The blocks are others.
        PlanMismatchError: The plan is for another model.
        OptionError: The plan has activation bits, the work folder holds another run's
            work, or ``out`` is one of the files.
        DataError: The tokens cannot be used.
        NonFiniteError: A weight or an activation is NaN or infinite.
        CalibrationError: Moments cannot be inverted.
        BudgetExceededError: The file would exceed the plan's limit; nothing is written,
            and the work folder is removed.
        OutputError: The file or the work folder cannot be written.
    """
    check_writable(out)
    shards = Shards(folder)
    check_no_input(out, shards.files)
    run = Run(
        shards,
        Skeleton(folder),
        plan,
        tokens,
        compensation or Compensation(),
        check_coding(coding),
        Path(f"{out}.work") if work is None else Path(work),
    )
    with threads(FIXED):
        try:
            run.all_stages(progress=progress)
            size = run.write(out)
        except BudgetExceededError:
            run.work.forget()  # of no use to any other plan
            raise
    run.work.forget()
    return size
