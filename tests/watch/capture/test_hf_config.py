"""Process-wide settings are restored after a watch, with several models and threads at once."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import bert
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import regard
from regard.watch.capture.hf_config import observable


def test_opaque_implementation_is_replaced_and_restored() -> None:
    model, inputs = bert("sdpa")
    model.config._attn_implementation = "opaque_kernel"
    with torch.no_grad(), regard.watch(model.eval()) as recording:
        assert model.config._attn_implementation == "sdpa"
        with observable(model):
            pass
        assert model.config._attn_implementation == "sdpa", "the outer block still needs it"
        model(**inputs)
    assert model.config._attn_implementation == "opaque_kernel"
    assert len(recording) == 2


def test_observable_implementation_is_kept() -> None:
    for name in ("eager", "sdpa", "flex_attention"):
        model, _ = bert("sdpa")
        model.config._attn_implementation = name
        with regard.watch(model):
            assert model.config._attn_implementation == name


def test_eager_model_returns_attentions() -> None:
    model, inputs = bert("eager")
    with torch.no_grad(), regard.watch(model.eval(), top=17) as recording:
        out = model(**inputs, output_attentions=True)
    assert len(out.attentions) == len(recording) == 2
    assert torch.equal(out.attentions[0].amax(-1), recording[0].max)


class Warns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("from the model", stacklevel=1)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("watch_compiled", [False, True])
def test_compiled_module_hides_only_the_hooks_warning(watch_compiled: bool) -> None:
    """Either the compiled module or the original one is watched. Warnings shown once are not shown again."""
    model, x = Warns(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for _ in range(2):
            with torch.no_grad(), regard.watch(compiled if watch_compiled else model) as recording:
                compiled(x)
            assert len(recording) == 1
        assert [str(warning.message) for warning in caught] == ["from the model"]
        assert list(warnings.filters) == before
        handle = register_module_forward_hook(lambda *_: None)
        compiled(x)
        handle.remove()
    assert "when there are global hooks" in str(caught[-1].message), "hooks of others must still warn after the watch"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        self.config = Config()

    def forward(self, x: Tensor, barrier: threading.Barrier) -> Tensor:
        barrier.wait(20)  # all threads are inside the model at once
        x = self.inner(x)
        barrier.wait(20)
        return F.scaled_dot_product_attention(x, x, x)


class Config:
    _attn_implementation = "hidden"


def test_threads_sharing_a_config() -> None:
    models, barrier, x = [Model().eval() for _ in range(4)], threading.Barrier(4), torch.randn(2, 6, 16)
    for model in models[1:]:
        model.config = models[0].config
    names_by_thread: dict[int, list[str]] = {}

    def run(n: int) -> None:
        with torch.no_grad(), watched_or_not(models[n], n) as recording:
            models[n](x, barrier)
        names_by_thread[n] = [] if recording is None else [record.name for record in recording]

    @contextmanager
    def watched_or_not(model: nn.Module, n: int):  # type: ignore[no-untyped-def]
        if n == 3:
            yield None
        else:
            with regard.watch(model) as recording:
                yield recording

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["inner.layers.0.self_attn", "inner.layers.1.self_attn", ""]
    assert names_by_thread == {0: names, 1: names, 2: names, 3: []}
    assert models[0].config._attn_implementation == "hidden"
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
