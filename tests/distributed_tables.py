"""Whether two sensitivities are equal."""

from dataclasses import fields

import numpy as np
import pytest

import fitcompress as fc


def equal(found: fc.Sensitivity, wanted: fc.Sensitivity, rtol: float = 1e-6) -> None:
    for field in fields(fc.Sensitivity):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(b, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0, err_msg=field.name)
        elif field.name == "loss":
            assert a == pytest.approx(b, rel=rtol)
        elif field.name != "provenance":
            assert a == b, field.name
