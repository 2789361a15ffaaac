"""The integer types of ONNX that codes are stored in."""

from __future__ import annotations

from dataclasses import dataclass

from fitcompress.errors import OptionError

__all__ = ["OPSETS", "IntegerType", "activation_type", "check_options", "weight_type"]

OPSETS = range(18, 26)


@dataclass(frozen=True)
class IntegerType:
    """One integer type.

    Attributes:
        name: As ONNX spells it.
        bits: Width.
        signed: Whether it has negative numbers.
        opset: The first operator set whose DequantizeLinear takes it.
    """

    name: str
    bits: int
    signed: bool
    opset: int

    @property
    def lowest(self) -> int:
        """The smallest number of the type."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest number of the type."""
        return self.lowest + (1 << self.bits) - 1


SIGNED = (
    IntegerType("INT2", 2, True, 25),
    IntegerType("INT4", 4, True, 21),
    IntegerType("INT8", 8, True, 13),
    IntegerType("INT16", 16, True, 21),
)
UNSIGNED = (IntegerType("UINT8", 8, False, 13), IntegerType("UINT16", 16, False, 21))


def check_options(opset: int, min_bits: int, channel_multiple: int) -> None:
    """Raise unless a file can be written with these options.

    Raises:
        OptionError: It cannot.
    """
    if type(opset) is not int or opset not in OPSETS:
        raise OptionError(
            "this operator set cannot be written",
            got=f"opset={opset!r}",
            wanted=f"{OPSETS[0]} … {OPSETS[-1]}",
            fix="leave it out: 21 has 4-bit and 16-bit integers",
        )
    if type(min_bits) is not int or min_bits not in (2, 4, 8, 16):
        raise OptionError(
            "no integer type has these bits",
            got=f"min_bits={min_bits!r}",
            wanted="2, 4, 8 or 16",
        )
    if type(channel_multiple) is not int or channel_multiple < 1:
        raise OptionError(
            "layers cannot have a multiple of so many channels",
            got=f"channel_multiple={channel_multiple!r}",
            wanted="1 or more",
        )


def weight_type(
    lowest: int, highest: int, opset: int, min_bits: int
) -> IntegerType | None:
    """Return the narrowest type of at least ``min_bits`` bits for codes, or None."""
    fitting = (
        kind
        for kind in SIGNED
        if kind.opset <= opset
        and kind.bits >= min_bits
        and kind.lowest <= lowest
        and highest <= kind.highest
    )
    return next(fitting, None)


def activation_type(codes: int, opset: int) -> IntegerType | None:
    """Return the narrowest unsigned type of so many numbers from 8 bits on, or None.

    Narrower ones exist, but no kernel multiplies them.
    """
    fitting = (k for k in UNSIGNED if k.opset <= opset and codes <= 2**k.bits)
    return next(fitting, None)
