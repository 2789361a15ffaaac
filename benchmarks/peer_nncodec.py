"""NNCodec 2.x (ISO/IEC 15938-17): whole bitstreams."""

from __future__ import annotations

import copy
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.quantize import fold_norms_
from peer_files import Compressed

if TYPE_CHECKING:
    from collections.abc import Sequence


def nncodec(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    size: int,
    *,
    folded: bool = True,
) -> Compressed:
    """Code the network by NNCodec at the finest step whose bitstream is within `size`.

    Dependent quantization and DeepCABAC at the package's own settings; no data is used.
    Its steps are about 19 % apart (`qp`, four to an octave), so that some of `size`
    may stay unused.

    Args:
        model: The trained network; unchanged.
        inputs: Not used.
        size: Bytes that the bitstream may take.
        folded: Code two numbers per channel of a batch norm instead of four, as in the
            other files here.

    Raises:
        ImportError: The package is not installed.
        ValueError: Nothing fits.
    """
    del inputs
    codec = import_nncodec()
    small = copy.deepcopy(model).eval()
    if folded:
        fold_norms_(small)
    arrays = {
        key: value.detach().numpy()
        for key, value in small.state_dict().items()
        if value.dtype == torch.float32
        and not (folded and key.endswith(("running_mean", "running_var")))
    }

    def code(qp: int) -> bytearray:
        return codec.compress(
            {key: value.copy() for key, value in arrays.items()},
            bitstream_path=None,
            return_bitstream=True,
            qp=qp,
        )

    fine, coarse = -60, 12  # steps of 2^(qp / 4)
    if len(code(coarse)) > size:
        message = f"nothing fits into {size} bytes; the least is {len(code(coarse))}"
        raise ValueError(message)
    while coarse - fine > 1:
        middle = (fine + coarse) // 2
        fine, coarse = (fine, middle) if len(code(middle)) <= size else (middle, coarse)
    stream = code(coarse)
    decoded = codec.decompress(bytearray(stream))
    state = small.state_dict()
    for key in arrays:
        state[key] = torch.from_numpy(decoded[key]).reshape(state[key].shape)
    small.load_state_dict(state)
    return Compressed(small, len(stream))


def import_nncodec() -> Any:
    """Return the module that codes; the frameworks around it are not needed.

    `nncodec.framework` holds data sets and training loops and imports torchvision,
    pandas and OpenCV for them. Coding arrays uses none of it, so that
    ``pip install --no-deps nncodec`` is enough.
    """
    name = "nncodec.framework"
    if "nncodec.nnc" not in sys.modules and name not in sys.modules:
        stand_in = types.ModuleType(name)
        for part in ("pytorch_model", "tensorflow_model", "use_case_init"):
            setattr(stand_in, part, None)
        sys.modules[name] = stand_in
        try:
            from nncodec import nnc
        except ImportError as error:
            message = f"{error} (pip install --no-deps nncodec)"
            raise ImportError(message) from error
        finally:
            del sys.modules[name]
        return nnc
    from nncodec import nnc

    return nnc
