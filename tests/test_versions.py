"""Versions for bug reports, installed or not."""

import importlib
from importlib import metadata

import pytest

import fitcompress as fc
from fitcompress import versions


def test_the_text_has_every_version() -> None:
    found = versions.versions()
    assert found["fitcompress"] == fc.__version__
    assert {"python", "torch", "numpy", "safetensors", "cores"} <= found.keys()
    assert fc.show_versions() == "\n".join(f"{k}: {v}" for k, v in found.items())


def test_the_package_need_not_be_installed() -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "version", missing)
        assert importlib.reload(versions).__version__ == "0+unknown"
        assert versions.versions()["numpy"] == "not installed"
    assert importlib.reload(versions).__version__ == fc.__version__
