"""Common properties of all layers of `regard.nn.vision`: shapes, dtypes, layouts, gradients, error messages."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.feature_maps import B, C, H, W, close, randn, shaken
from torch import nn

from regard import Summary, normalizer, score
from regard.backends.choose import record_backends
from regard.nn.vision import (
    CBAM,
    AttentionPool2d,
    Learned2d,
    NonLocalBlock,
    PatchAttention,
    RelativeBias2d,
    Rotary2d,
    Sinusoidal2d,
    SqueezeExcitation,
    WindowAttention2d,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "squeeze-excitation": lambda: SqueezeExcitation(C, 3),
    "cbam": lambda: CBAM(C, 2, 3),
    "non-local": lambda: NonLocalBlock(C),
    "gaussian": lambda: NonLocalBlock(C, 3, "gaussian", pool=True),
    "without norm": lambda: NonLocalBlock(C, norm=False),
    "patches": lambda: PatchAttention(C, 2, 3),
    "rotary": lambda: PatchAttention(C, 2, position=Rotary2d(4)),
    "relative": lambda: PatchAttention(C, 2, 2, width=6, position=RelativeBias2d(2, (4, 9))),
    "learned": lambda: PatchAttention(C, 2, position=Learned2d(C, (H, 11)), normalizer=normalizer.Sparsemax()),
    "windows": lambda: WindowAttention2d(C, 2, 3),
    "shifted": lambda: WindowAttention2d(C, 2, (4, 3), (2, 1)),
    "cosine": lambda: WindowAttention2d(C, 2, 2, 1, score=score.Cosine(nn.Parameter(torch.rand(2) + 0.1))),
    "pooling": lambda: AttentionPool2d(C, 2, 11),
    "learned query": lambda: AttentionPool2d(C, 4, mean=False, position=nn.Identity()),
}
GATED = ("squeeze-excitation", "cbam")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


EVERY = pytest.mark.parametrize("name", LAYERS)


@EVERY
@pytest.mark.parametrize("size", [(H, W), (1, 1), (2, 9), (4, 4)])
def test_output_shape_and_independence_of_batch_rows(name: str, size: tuple[int, int]) -> None:
    if name == "learned" and size != (H, W):
        size = (H - 2, W + 4)
    layer, x = shaken(LAYERS[name]()).eval(), randn(B, C, *size)
    out = layer(x)
    assert out.shape == ((B, layer.out.out_features) if isinstance(layer, AttentionPool2d) else x.shape)
    for b in range(B):
        close(layer(x[b : b + 1])[0], out[b])


@EVERY
def test_empty_batch_has_zero_gradients(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(0, C, H, W, requires_grad=True)
    out = layer(x)
    assert out.shape == layer(torch.randn(2, C, H, W))[:0].shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_formats_and_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, x = shaken(LAYERS[name]()).eval().to(dtype), torch.randn(B, C, H, W).to(dtype)
    expected = layer(x)
    assert expected.dtype == dtype
    limit = 2 * max(off(expected, layer, x), torch.finfo(dtype).eps * expected.abs().max().item())
    others = (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0])
    for other in others:
        assert other.stride() != x.stride()
        assert off(layer(other), layer, x) <= limit
    if expected.dim() == 4:
        assert expected.is_contiguous()
        assert layer(others[0]).is_contiguous(memory_format=torch.channels_last)


def off(out: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> float:
    """Return the error of an output relative to float64."""
    return (out.double() - copy.deepcopy(layer).double()(x.double())).abs().max().item()


@EVERY
def test_state_dict_round_trip(name: str) -> None:
    layer, other, x = shaken(LAYERS[name]()).eval(), LAYERS[name]().double().eval(), randn(B, C, H, W)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(layer(x), layer(x))


@EVERY
def test_summary_does_not_change_output(name: str) -> None:
    layer, x = shaken(LAYERS[name]()).float().eval(), torch.randn(B, C, H, W)
    out, statistics = layer(x, summary=True if name in GATED else Summary(entropy=True, top=3, received=True))
    assert torch.equal(out, layer(x))
    assert all(part.shape[0] == B for part in statistics if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in (*GATED, "pooling", "learned query")])
def test_residual_layers_start_as_identity_and_learn(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(B, C, H, W)
    assert torch.equal(layer(x), x)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimiser.step()
    assert not torch.isclose(layer(x), x).all()


@EVERY
def test_all_parameters_have_correct_gradients(name: str) -> None:
    layer, x = shaken(LAYERS[name]()), randn(2, C, 3, 4)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    small = torch.randn(1, C, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.eval(), small)


@pytest.mark.parametrize("name", ["cbam", "gaussian", "patches", "rotary", "shifted", "pooling"])
def test_vision_layers_compile_without_graph_breaks(name: str) -> None:
    layer, x = shaken(LAYERS[name]()).float().eval(), torch.randn(B, C, H, W)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert (compiled(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()


@EVERY
def test_autocast_error_is_within_that_of_dtype(name: str) -> None:
    layer, x = shaken(LAYERS[name]()).float().eval(), torch.randn(B, C, H, W)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert off(got, layer, x) <= 2 * off(half, layer, x)


def test_vision_layers_use_cpu_backend() -> None:
    for name in set(LAYERS) - set(GATED):
        with record_backends() as kernels:
            LAYERS[name]()(torch.randn(B, C, H, W))
        assert kernels == ["cpu"], name


# ---------------------------------------------------------------------------------------------------------------------
# Invalid arguments.

X = torch.zeros(2, C, 3, 3)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SqueezeExcitation(0), ValueError, "SqueezeExcitation: channels is 0; expected an integer >= 1"),
    (lambda: SqueezeExcitation(8, 0.5), TypeError, "SqueezeExcitation: reduction is 0.5; expected an integer >= 1"),
    (
        lambda: SqueezeExcitation(C)(X, summary=Summary()), TypeError,
        "SqueezeExcitation: summary is an object of class Summary; expected True or False (a Summary is about attention "
        "weights; this layer has gates)",
    ),
    (lambda: CBAM(8, kernel_size=4), ValueError, "CBAM: kernel_size is 4; expected an odd integer > 0"),
    (
        lambda: CBAM(4)(X), ValueError,
        "CBAM: x is a float32 tensor of shape (2, 8, 3, 3); expected a float tensor of shape (B, 4, H, W) with H and W > 0",
    ),
    (
        lambda: NonLocalBlock(C)(X.int()), TypeError,
        "NonLocalBlock: x is an int32 tensor of shape (2, 8, 3, 3); expected a float tensor of shape (B, 8, H, W) with H and W > 0",
    ),
    (
        lambda: NonLocalBlock(C)(X[..., :0]), ValueError,
        "NonLocalBlock: x is a float32 tensor of shape (2, 8, 3, 0); expected a float tensor of shape (B, 8, H, W) with H and W > 0",
    ),
    (lambda: NonLocalBlock(8, 0), ValueError, "NonLocalBlock: width is 0; expected an integer >= 1, or None for half of the channels"),
    (
        lambda: NonLocalBlock(8, score="dot"), ValueError,
        "NonLocalBlock: score is 'dot'; expected \"embedded_gaussian\" or \"gaussian\"",
    ),
    (lambda: PatchAttention(8, 3), ValueError, "PatchAttention: num_heads is 3; expected a divisor of the width, 8"),
    (lambda: PatchAttention(8, 2, 0), ValueError, "PatchAttention: patch is 0; expected an integer >= 1"),
    (
        lambda: PatchAttention(8, 2, position="rotary"), TypeError,
        "PatchAttention: position is 'rotary'; expected a module, or None for Sinusoidal2d()",
    ),
    (
        lambda: PatchAttention(8, 2, position=Rotary2d(8)), ValueError,
        "PatchAttention: position rotates 8 elements of each head; expected at most 4, the width of a head",
    ),
    (
        lambda: PatchAttention(8, 2, position=RelativeBias2d(1, 3)), ValueError,
        "PatchAttention: position has a table for 1 heads; expected 2",
    ),
    (
        lambda: PatchAttention(8, 2, position=RelativeBias2d(2, (4, 2)))(X), ValueError,
        "RelativeBias2d: the map is 3x3; expected at most 4x2, the size",
    ),
    (lambda: Sinusoidal2d()(X[:, :6]), ValueError, "Sinusoidal2d: x has 6 channels; expected a multiple of 4"),
    (lambda: Sinusoidal2d(-1.0), ValueError, "Sinusoidal2d: base is -1.0; expected a finite number > 0"),
    (lambda: Learned2d(8, 2)(X), ValueError, "Learned2d: the map is 3x3; expected at most 2x2, the size"),
    (lambda: Rotary2d(6), ValueError, "Rotary2d: width is 6; expected a multiple of 4, > 0"),
    (lambda: WindowAttention2d(8, 0), ValueError, "WindowAttention2d: num_heads is 0; expected a divisor of the width, 8"),
    (
        lambda: WindowAttention2d(8, 2, (3, 0)), ValueError,
        "WindowAttention2d: window is (3, 0); expected an integer >= 1, or a pair (rows, columns)",
    ),
    (
        lambda: WindowAttention2d(8, 2, 3, "1"), TypeError,
        "WindowAttention2d: shift is '1'; expected an integer >= 0, or a pair (rows, columns)",
    ),
    (lambda: WindowAttention2d(8, 2, 3, 3), ValueError, "WindowAttention2d: shift is 3; expected less than the window, 3"),
    (lambda: AttentionPool2d(8, 2, 0), ValueError, "AttentionPool2d: out is 0; expected an integer >= 1, or None for the channels"),
    (
        lambda: AttentionPool2d(8, 2, position=Sinusoidal2d), TypeError,
        "AttentionPool2d: position is the class Sinusoidal2d; expected a module that adds positions to a map, or None for "
        "Sinusoidal2d()",
    ),
    (
        lambda: AttentionPool2d(8, 2, position=Rotary2d(4)), TypeError,
        "AttentionPool2d: position is an object of class Rotary2d; expected a module that adds positions to a map, or None "
        "for Sinusoidal2d()",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=[message[:50] for *_, message in WRONG])
def test_invalid_arguments_raise(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
