"""Models of Hugging Face: folders in and out, and training under the ``Trainer``."""

from typing import TYPE_CHECKING, Any

from fitcompress.hugging_face.folder import (
    build_model,
    load_model,
    load_tokenizer,
    save_pretrained,
)
from fitcompress.hugging_face.packages import import_transformers

if TYPE_CHECKING:
    from fitcompress.hugging_face.training import KeepSize

__all__ = [
    "KeepSize",
    "build_model",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    """Import ``KeepSize`` when it is asked for: its base class is transformers'."""
    if name != "KeepSize":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    import_transformers()
    from fitcompress.hugging_face.training import KeepSize

    return KeepSize
