"""square_accumulate_ and ghost_norms_ on a CUDA device."""

import pytest
import torch

from fitcompress import ops
from gradient_squares import CASES, exact, example, layouts, moment_of, norms_of

# What the CUDA kernels cut differently: tiles of 64 or 128, 16 bytes of channels, steps
# of 16 or 32 positions, slices of the samples, 16 samples summed in float32.
CUDA_CASES = CASES | {
    "large tiles": example(33, 250, 250, (1, 1, 20)),
    "large tiles of patches": example(130, 14, 128, (1, 3, 3), (1, 3, 3)),
    "edges of tiles": example(2, 129, 65, (1, 1, 33)),
    "full tiles": example(2, 128, 64, (1, 1, 32)),
    "8 positions": example(4, 70, 30, (1, 1, 8)),
    "9 positions": example(4, 70, 30, (1, 1, 9)),
    "many positions": example(1, 24, 16, (1, 1, 700)),
    "many samples": example(700, 17, 20, (1, 1, 1)),
    "one position of a kernel": example(37, 6, 18, (1, 1, 1), (1, 3, 2), groups=2),
    "slices of samples": example(1100, 17, 20, (1, 1, 3)),
    "many samples of few weights": example(600, 4, 4, (1, 1, 2)),
    "groups of patches": example(3, 80, 48, (1, 5, 5), (1, 3, 3), groups=2),
    "images of patches": example(2, 20, 18, (1, 3, 3), (1, 2, 2), images=7),
}  # fmt: skip


def on_cuda(case, moment_dtype=torch.float64):
    """The moment, the norms and the ghost norms of the CUDA kernels."""
    grads, input, options = case
    moment, norms = moment_of(case, moment_dtype).cuda(), norms_of(case).cuda()
    ghosts = norms.clone()
    ops.square_accumulate_(moment, norms, grads.cuda(), input.cuda(), **options)
    ops.ghost_norms_(ghosts, grads.cuda(), input.cuda(), **options)
    return moment.cpu(), norms.cpu(), ghosts.cpu()


def assert_cuda_near(found, case):
    """Equal to the twin but for sums in float32, which tensor cores cut off."""
    moment, norms, ghosts = found
    wanted, wanted_norms = exact(case)
    wanted += moment_of(case, moment.dtype) - moment_of(case)
    mean = float(wanted.mean()) if wanted.numel() else 0.0
    torch.testing.assert_close(moment.double(), wanted, rtol=1e-4, atol=2e-5 * mean)
    torch.testing.assert_close(norms, wanted_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(ghosts, wanted_norms, rtol=1e-5, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_equals_the_twin(name, moment_dtype, dtype):
    grads, input, options = CUDA_CASES[name]
    case = (grads.to(dtype), input.to(dtype), options)
    assert_cuda_near(on_cuda(case, moment_dtype), case)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["full tiles", "conv2d", "depthwise", "grouped"])
def test_cuda_any_strides(name, dtype):
    grads, input, options = CUDA_CASES[name]
    for e in layouts(grads.to(dtype).cuda()):
        for x in layouts(input.to(dtype).cuda()):
            assert_cuda_near(on_cuda((e, x, options)), (e.cpu(), x.cpu(), options))


@pytest.mark.cuda
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_same_bits_in_every_call(name):
    grads, input, options = CUDA_CASES[name]
    case = (grads.bfloat16(), input.bfloat16(), options)
    for one, other in zip(on_cuda(case), on_cuda(case), strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
def test_cuda_moment_and_norms_alone_equal_both_together():
    case = CUDA_CASES["slices of samples"]
    grads, input, options = case[0].cuda(), case[1].cuda(), case[2]
    both, norms, _ = on_cuda(case)
    moment, alone = moment_of(case).cuda(), norms_of(case).cuda()
    ops.square_accumulate_(moment, None, grads, input, **options)
    ops.square_accumulate_(None, alone, grads, input, **options)
    ops.square_accumulate_(None, None, grads, input, **options)
    assert torch.equal(moment.cpu(), both)
    torch.testing.assert_close(alone.cpu(), norms, rtol=1e-6, atol=0)


@pytest.mark.cuda
def test_cuda_what_is_not_finite_shows():
    grads, input, options = example(3, 64, 64, (1, 1, 20))
    grads[1, 2, 0, 0, 1] = float("nan")
    moment, norms, ghosts = on_cuda((grads, input, options))
    assert not torch.isfinite(moment[2]).any()
    assert torch.isfinite(moment[3:]).all()
    assert torch.isfinite(norms).tolist() == [True, False, True]
    assert torch.isfinite(ghosts).tolist() == [True, False, True]
