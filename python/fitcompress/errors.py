"""The errors and warnings of the package, each with a remedy in its text."""

from __future__ import annotations

__all__ = [
    "BudgetExceededError",
    "BudgetInfeasibleError",
    "CalibrationError",
    "DataError",
    "DistributedError",
    "EmptyLoaderError",
    "ExportError",
    "FitcompressError",
    "FormatError",
    "LatencyError",
    "MemorisedDataWarning",
    "MissingDependencyError",
    "NoCompressibleLayerError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "PlanMismatchError",
    "SearchLimitError",
    "UnsupportedLayerError",
]


class FitcompressError(Exception):
    """Base of every error that the package raises on purpose.

    Args:
        what: What went wrong, one clause.
        got: What was found.
        wanted: What was expected.
        fix: What the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        text = what
        if got is not None:
            text += f"; got {got}"
        if wanted is not None:
            text += f"; wanted {wanted}"
        if fix is not None:
            text += f". To fix it: {fix}"
        super().__init__(text)


class MemorisedDataWarning(UserWarning):
    """The network has memorised the data that its sensitivity is measured on."""


class NoCompressibleLayerError(FitcompressError, ValueError):
    """The model has no layer that can be compressed."""


class UnsupportedLayerError(FitcompressError, ValueError):
    """A plan or option names a layer that cannot be compressed."""


class EmptyLoaderError(FitcompressError, ValueError):
    """A data loader yielded nothing."""


class DataError(FitcompressError, ValueError):
    """Data, labels or a data folder are not what was expected."""


class DistributedError(FitcompressError, RuntimeError):
    """Another process of a ``torch.distributed`` group failed, is gone, or differs."""


class CalibrationError(FitcompressError, ValueError):
    """Calibration data do not serve: a layer is never reached, say."""


class NonFiniteError(FitcompressError, ValueError):
    """A weight, an input or a loss is NaN or infinite."""


class PlanMismatchError(FitcompressError, ValueError):
    """A plan, a sensitivity or a packed file belongs to another model."""


class BudgetInfeasibleError(FitcompressError, ValueError):
    """No plan meets the budget; ``smallest`` is the least that can be reached.

    Attributes:
        smallest: The smallest reachable cost, in the budget's unit (bytes or BOPs).
    """

    def __init__(
        self,
        what: str,
        *,
        smallest: int,
        got: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, got=got, wanted=wanted, fix=fix)
        self.smallest = smallest


class BudgetExceededError(FitcompressError, ValueError):
    """The packed file would be larger than its plan's budget, so it is not written.

    Attributes:
        size_bytes: The size that the file would have.
    """

    def __init__(
        self,
        what: str,
        *,
        size_bytes: int,
        got: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, got=got, wanted=wanted, fix=fix)
        self.size_bytes = size_bytes


class ExportError(FitcompressError, ValueError):
    """A model cannot be written in the format of another runtime."""


class OptionError(FitcompressError, ValueError):
    """An option, or a combination of options, cannot work."""


class SearchLimitError(FitcompressError, RuntimeError):
    """A search gave up before it met the budget."""


class FormatError(FitcompressError, ValueError):
    """A file is damaged, truncated or of another format or version."""


class LatencyError(FitcompressError, RuntimeError):
    """A target could not time a file."""


class OutputError(FitcompressError, OSError):
    """A file cannot be written."""


class MissingDependencyError(FitcompressError, ImportError):
    """An optional package that this step needs is not installed."""
