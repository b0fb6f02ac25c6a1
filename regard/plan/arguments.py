"""Check the arguments of a call one by one. Errors are raised here, or by `check` of a component."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from regard import check
from regard.components import mask, normalizer, position, score, summary
from regard.components.component import field_names
from regard.components.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.components.normalizer import Normalizer
from regard.components.position import Bias
from regard.components.predicate import conjuncts
from regard.components.score import Score
from regard.components.summary import Summary
from regard.components.tile import Align, Sizes

_AXES = {"q": "(..., H, L, D)", "k": "(..., G, S, D)", "v": "(..., G, S, E)"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Components whose `check` depends on their fields only. `check` of a user's class may depend on anything.
CACHEABLE = frozenset(
    kind
    for module in (mask, normalizer, position, score, summary)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
)

C = TypeVar("C", Score, Normalizer, Summary, Mask, Bias)

_EXPECTED: dict[type[Any], str] = {
    Score: "one of regard.score, such as score.Dot(), or a function (q, k) -> scores",
    Normalizer: "one of regard.normalizer, such as normalizer.Softmax()",
    Mask: "one of regard.mask, such as mask.causal()",
    Bias: "a float tensor that broadcasts to (B, H, L, S), position.ALiBi, position.T5, or a function of positions",
    Summary: "a regard.Summary, such as Summary(lse=True)",
}
_ABSTRACT = (Score, Normalizer, Mask, Bias)


def check_component(name: str, component: Any, kind: type[C], device: torch.device) -> C:
    """Return `component`; raise unless it is an instance of `kind` with its tensors on the device of q."""
    if not isinstance(component, kind) or type(component) in _ABSTRACT:
        raise check.error(name, component, _EXPECTED[kind] + _hint(component, kind), False)
    _check_devices(name, component, device)
    return component


def _hint(value: object, kind: type[Any]) -> str:
    """Return a hint at what was probably meant, or an empty string."""
    if isinstance(value, type) and issubclass(value, kind) and value not in _ABSTRACT:
        return f" (an object of this class: {value.__name__}(...))"
    if kind is Mask and check.is_float_tensor(value):
        return " (a float mask that is added to the scores goes into bias=)"
    if kind is Mask and isinstance(value, Tensor):
        return ", or mask.dense(tensor) for a bool tensor, True = may attend"
    if kind is Bias and check.is_bool_tensor(value):
        return " (a bool tensor goes into mask=mask.dense(tensor), True = may attend)"
    if kind is Bias and isinstance(value, torch.nn.Module):
        return " (call modules of regard.position on the input, or on q and k)"
    return ""


def _check_devices(name: str, component: Any, device: torch.device) -> None:
    """Raise if a tensor of a component is on another device than q: moving it would cost a copy per call. As everywhere
    in torch, a tensor of shape () on the CPU is compatible with any device.
    """
    for field in field_names(component) or ():
        value = getattr(component, field)
        if isinstance(value, Tensor):
            if value.device != device and (value.dim() or value.device.type != "cpu"):
                raise ValueError(f"{name}: {field} is on {value.device} but q is on {device}; expected the same")
        elif field_names(value) is not None:
            _check_devices(name, value, device)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k and v have compatible shapes, dtypes and devices."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            nested = isinstance(x, Tensor) and x.is_nested
            hint = " (pad it and use mask.lengths, or pack it and use mask.documents)" if nested else ""
            raise check.error(name, x, f"a strided tensor {_AXES[name]}{hint}", False)
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least two dimensions, {_AXES[name]}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; expected float32, float64, bfloat16 or float16")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but q has {q.dtype}; expected the same")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; expected the same")
        if x.dim() != q.dim():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; expected as many dimensions"
            )
        batch = batch_dimensions(q)
        for got, expected in zip(x.shape[batch], q.shape[batch], strict=True):
            if got not in (1, expected):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; expected the batch dimensions of q, {tuple(q.shape[batch])}, "
                    "or 1"
                )
    if q.dim() > 3:
        H, G = q.shape[-3], k.shape[-3]
        if H != G and (G == 0 or H % G):
            raise ValueError(
                f"k has {G} heads (shape {tuple(k.shape)}) but q has {H} (shape {tuple(q.shape)}); expected k "
                f"{_AXES['k']} with as many heads, or a divisor of them (grouped queries)"
            )
        if v.shape[-3] != G:
            raise ValueError(
                f"v has {v.shape[-3]} heads (shape {tuple(v.shape)}) but k has {G} (shape {tuple(k.shape)}); "
                "expected as many"
            )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v has {v.shape[-2]} keys (shape {tuple(v.shape)}) but k has {k.shape[-2]} (shape {tuple(k.shape)}); "
            f"expected as many, v {_AXES['v']} for k {_AXES['k']}"
        )


def batch_dimensions(x: Tensor) -> slice:
    """Return the batch dimensions of q, k or v: those before the heads; of three dimensions, the first."""
    return slice(None, -3) if x.dim() > 3 else slice(None, -2)


def expand_queries(q: Any, k: Any) -> Any:
    """Return q with batch dimensions of size 1 expanded to those of k."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor)) or q.dim() != k.dim() or q.dim() < 3 or q.is_nested:
        return q
    batch = batch_dimensions(q)
    own, other = q.shape[batch], k.shape[batch]
    if 1 not in own or own == other:
        return q
    return q.expand(*[m if n == 1 else n for n, m in zip(own, other, strict=True)], *q.shape[batch.stop :])


def with_batch_tables(mask: Any) -> Any:
    """Return a mask for q (B, L, D), whose tables of three dimensions are (B, L, S): there are no heads."""
    if isinstance(mask, And | Or):
        left, right = with_batch_tables(mask.left), with_batch_tables(mask.right)
        return mask if left is mask.left and right is mask.right else type(mask)(left, right)
    if isinstance(mask, Not):
        inner = with_batch_tables(mask.inner)
        return mask if inner is mask.inner else Not(inner)
    if type(mask) not in (Dense, Blocks) or mask.table.shape[0] != 1 or mask.table.shape[1] == 1:
        return mask
    return dataclasses.replace(mask, table=mask.table.transpose(0, 1))


def four_axes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reshape (L, D) to (1, 1, L, D), (B, L, D) to (B, 1, L, D), and (X, Y, H, L, D) to (X*Y, H, L, D). Batch
    dimensions of size 1 are expanded.
    """
    if q.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]:
        return q, k, v
    if q.dim() == 2:
        return q[None, None], k[None, None], v[None, None]
    if q.dim() == 3:
        q, k, v = q[:, None], k[:, None], v[:, None]
    batch = q.shape[:-3]
    if k.shape[:-3] != batch:
        k = k.expand(*batch, *k.shape[-3:])
    if v.shape[:-3] != batch:
        v = v.expand(*batch, *v.shape[-3:])
    return (q, k, v) if q.dim() == 4 else (q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))


def check_seed(dropout: float, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Check dropout and seed; return the seed as an int64 tensor of shape (), drawn at random if it is None."""
    if not check.is_number(dropout) or not 0.0 <= dropout <= 1.0:
        expected = "a probability from 0 to 1"
        raise check.error("dropout", dropout, expected, check.is_number(dropout))
    if seed is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)
    expected = "a 64-bit integer, an int64 tensor of shape (), or None to draw one"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise check.error("seed", seed, expected, seed.dtype == torch.int64)
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"seed is on {seed.device} but q is on {device}; expected the same")
        return seed
    if not check.is_int(seed) or not -(1 << 63) <= seed < 1 << 63:
        raise check.error("seed", seed, expected, check.is_int(seed))
    return torch.tensor(seed, device=device)


def four_axis_bias(bias: Any, lead: Sequence[int], size: Sizes) -> Tensor:
    """Return a bias tensor with four dimensions, which broadcast to (B, H, L, S)."""
    if not check.is_float_tensor(bias):
        raise check.error("bias", bias, _EXPECTED[Bias] + _hint(bias, Bias), False)
    axes = (*lead, size.L, size.S)
    if bias.dim() > max(4, len(axes)) or (bias.dim() > len(axes) and bias.shape[0] not in (1, size.B)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {axes}")
    if len(axes) == 3 and bias.dim() == 3:
        bias = bias[:, None]
    elif len(axes) > 4 and bias.dim() > 4:
        if any(got not in (1, expected) for got, expected in zip(bias.shape, axes, strict=True)):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {axes}")
        batch = [1] * len(lead[:-1]) if all(n == 1 for n in bias.shape[:-3]) else list(lead[:-1])
        bias = bias.expand(*batch, *bias.shape[-3:]).flatten(0, -4)
    out: Tensor = bias[(None,) * (4 - bias.dim())]
    return out


def resolve_alignment(mask: Mask | None, bias: Bias | None, size: Sizes) -> tuple[Mask | None, Bias | None]:
    """Set the missing `align` of parts of mask and bias to that of the other parts; raise if it is ambiguous and L !=
    S.
    """
    mask, bias = _set_alignment(mask, bias, size)
    if mask is not None and size.L != size.S:
        _refuse_end_of_rows(mask, size)
    return mask, bias


def _refuse_end_of_rows(mask: Mask, size: Sizes) -> None:
    """Raise if a band aligned with the end of all keys is combined by AND with lengths or documents, which have ends of
    their own.
    """
    parts = conjuncts(mask)
    is_end = any(isinstance(x, Band) and x.align == "end" and (x.left, x.right) != (None, None) for x in parts)
    kind = next(
        (type(x) for x in parts if isinstance(x, Documents) or (isinstance(x, Before) and x.n.dim() == 1)), None
    )
    if is_end and kind is not None:
        name, each = ("documents(ids)", "document") if kind is Documents else ("lengths(n)", "batch row")
        raise ValueError(
            f'mask: align="end" is combined with {name}, with L = {size.L} queries and S = {size.S} keys; expected '
            f"align=mask.{name} to align the last query of each {each} with its last key, or align={size.S - size.L} to "
            "align the last query with the last of all keys"
        )


def _set_alignment(mask: Mask | None, bias: Bias | None, size: Sizes) -> tuple[Mask | None, Bias | None]:
    found: list[Align] = []
    for component in (mask, bias):
        _aligns(component, found)
    if None not in found:
        return mask, bias
    named = [align for align in found if align is not None]
    if size.L == size.S and not named:
        return mask, bias
    name = "mask" if mask is not None and None in _aligns(mask, []) else "bias"
    if any(size.offset(align) != size.offset(named[0]) for align in named):
        raise ValueError(
            f"{name}: a part of it has no align, and the others have {', '.join(sorted(map(repr, set(named))))}; "
            "expected an align in each part, or the same in all others"
        )
    if not named:
        raise ValueError(
            f'{name}: align is required with L = {size.L} queries and S = {size.S} keys: "start" aligns query 0 with key '
            '0 (as is_causal of torch), "end" aligns the last query with the last key (decoding with a cache), and an int '
            "n aligns query 0 with key n"
        )
    return _with_align(mask, named[0]), _with_align(bias, named[0])


def _aligns(component: Any, found: list[Align]) -> list[Align]:
    for field in field_names(component) or ():
        value = getattr(component, field)
        if field == "align":
            found.append(value)
        else:
            _aligns(value, found)
    return found


def _with_align(component: Any, align: Align) -> Any:
    names = field_names(component)
    if names is None:
        return component
    parts = {}
    for field in names:
        value = getattr(component, field)
        parts[field] = align if field == "align" and value is None else _with_align(value, align)
    return type(component)(**parts)
