"""The native library and torch's stable C ABI."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitcompress import ops
from fitcompress.ops import library

CSRC = Path(__file__).parents[1] / "csrc"
HEADER = CSRC / "torch" / "stable_abi.h"
# declared weak, since they are absent from some builds of torch 2.10
WEAK = {
    "aoti_torch_get_current_cuda_stream",
    "torch_exception_get_what_without_backtrace",
}


def declared_functions():
    names = re.findall(r"\b((?:aoti_)?torch_\w+)\(", HEADER.read_text())
    assert len(names) > 20
    return set(names)


def torch_headers():
    include = Path(torch.__file__).parent / "include"
    headers = [
        include / "torch/csrc/inductor/aoti_torch/c/shim.h",
        include / "torch/csrc/stable/c/shim.h",
    ]
    if not all(header.exists() for header in headers):
        pytest.skip("this torch has no C++ headers")
    return include, headers


def test_declarations_agree_with_the_installed_torch(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    include, headers = torch_headers()
    lines = ["#define USE_CUDA", *[f'#include "{header}"' for header in headers]]
    source = tmp_path / "both.cpp"
    source.write_text("\n".join([*lines, f'#include "{HEADER}"', ""]))
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", str(source)]
    subprocess.run(command, check=True)

    source.write_text(
        source.read_text() + 'extern "C" int64_t aoti_torch_is_contiguous();\n'
    )
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode != 0, "a wrong declaration must not compile"
    assert "aoti_torch_is_contiguous" in failed.stderr


def test_every_function_is_one_of_torch():
    _, headers = torch_headers()
    text = "\n".join(header.read_text() for header in headers)
    missing = [n for n in declared_functions() if not re.search(rf"\b{n}\(", text)]
    assert missing == []


def test_the_stub_exports_what_is_declared():
    stub = re.findall(r"EXPORT\((\w+)\)", (CSRC / "torch" / "stub.cpp").read_text())
    names = [name for name in stub if name != "name"]
    assert names == sorted(set(names))
    assert set(names) == declared_functions() - WEAK


SAME_BITS = """
import sys
import torch
from fitcompress import ops

generator = torch.Generator().manual_seed(0)
weight = torch.randn(40, 333, generator=generator)
scale = torch.rand(40, generator=generator) + 0.1
square = torch.randn(333, 333, generator=generator).double().triu(1) * 0.1
results = {
    "table": list(
        ops.distortion_table(weight, weight**2, [2, 4], [0.1], [0.0, 0.5], smoothing=1)
    ),
    "clipped": list(
        ops.distortion_table(weight, weight**2, [2, 4], clips=ops.CLIPS, granularity=32)
    ),
    "forward": [ops.fake_quantize_prune(weight.half(), scale, None, 7)],
    "backward": list(
        torch.ops.fitcompress.fake_quantize_prune_backward(
            weight, weight, scale, None, 3
        )
    ),
    "codes": [
        ops.error_feedback_sweep(
            weight.double(), square + torch.eye(333), scale.double()
        )
    ],
}
torch.save({"set": ops.instruction_set(), **results}, sys.argv[1])
"""


def test_same_bits_on_every_instruction_set(tmp_path):
    results = []
    for name in (None, "default"):
        environment = {"PYTHONPATH": ":".join(sys.path)}
        if name is not None:
            environment["FITCOMPRESS_ISA"] = name
        path = tmp_path / f"{name}.pt"
        subprocess.run(
            [sys.executable, "-c", SAME_BITS, str(path)], env=environment, check=True
        )
        results.append(torch.load(path, weights_only=True))
    best, lowered = results
    assert lowered.pop("set") == "default"
    assert best.pop("set") in {"default", "avx2", "avx512"}
    for name, tensors in best.items():
        for ours, theirs in zip(tensors, lowered[name], strict=True):
            assert torch.equal(ours, theirs), name


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer, found 2\.9\.1"):
        library._load_library()


def test_a_missing_library_is_an_import_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="without its native library"):
        library._load_library()


def test_loading_twice_registers_once():
    assert library._load_library() is not None


@pytest.mark.cuda
def test_tensors_of_two_devices_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="device"):
        ops.fake_quantize_prune(torch.ones(2, 3).cuda(), torch.ones(1))


def test_has_cuda_tells_of_registered_kernels():
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(
        "fitcompress::fake_quantize_prune", "CUDA"
    )
    assert ops.has_cuda() == registered
