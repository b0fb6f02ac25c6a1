"""What a watch changes about the process, it changes back: for several models and threads at once."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import bert
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import regard
from regard.watch.capture.hf_config import readable
from regard.watch.capture.patch import Counted


def test_a_hidden_kernel_gives_way_and_comes_back() -> None:
    model, inputs = bert("sdpa")
    model.config._attn_implementation = "kernel_that_nobody_can_see_into"
    with torch.no_grad(), regard.watch(model.eval()) as seen:
        assert model.config._attn_implementation == "sdpa"
        with readable(model):
            pass
        assert model.config._attn_implementation == "sdpa", "somebody still needs it"
        model(**inputs)
    assert model.config._attn_implementation == "kernel_that_nobody_can_see_into"
    assert len(seen) == 2


def test_what_can_be_seen_stays_as_it_is() -> None:
    for name in ("eager", "sdpa", "flex_attention"):
        model, _ = bert("sdpa")
        model.config._attn_implementation = name
        with regard.watch(model):
            assert model.config._attn_implementation == name


def test_weights_asked_of_an_eager_model_are_still_given() -> None:
    model, inputs = bert("eager")
    with torch.no_grad(), regard.watch(model.eval(), top=17) as seen:
        out = model(**inputs, output_attentions=True)
    assert len(out.attentions) == len(seen) == 2
    assert torch.equal(out.attentions[0].amax(-1), seen[0].max)


class Warns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("the model's own", stacklevel=1)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules_warn_of_all_but_the_hooks_of_a_watch(whole: bool) -> None:
    """Whether the compiled module is watched, or what was compiled; and Python still knows what it has warned of."""
    model, x = Warns(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for _ in range(2):
            with torch.no_grad(), regard.watch(compiled if whole else model) as seen:
                compiled(x)
            assert len(seen) == 1
        assert [str(warning.message) for warning in told] == ["the model's own"]
        assert list(warnings.filters) == before
        handle = register_module_forward_hook(lambda *_: None)
        compiled(x)
        handle.remove()
    assert "when there are global hooks" in str(told[-1].message), "a hook of somebody else, after the watch"


def test_counted() -> None:
    made: list[str] = []

    def make() -> ExitStack:
        made.append("made")
        stack = ExitStack()
        stack.callback(made.append, "undone")
        return stack

    change = Counted(make)
    with change():
        with pytest.raises(KeyError), change():
            raise KeyError
        assert made == ["made"]
    assert made == ["made", "undone"]
    with change():
        pass
    assert made == ["made", "undone"] * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        self.config = Config()

    def forward(self, x: Tensor, turn: threading.Barrier) -> Tensor:
        turn.wait(20)  # all at once, in the middle of their runs
        x = self.inner(x)
        turn.wait(20)
        return F.scaled_dot_product_attention(x, x, x)


class Config:
    _attn_implementation = "hidden"


def test_threads_that_share_a_config_and_run_at_once() -> None:
    models, turn, x = [Model().eval() for _ in range(4)], threading.Barrier(4), torch.randn(2, 6, 16)
    for model in models[1:]:
        model.config = models[0].config
    found: dict[int, list[str]] = {}

    def work(n: int) -> None:
        with torch.no_grad(), watched_or_not(models[n], n) as seen:
            models[n](x, turn)
        found[n] = [] if seen is None else [record.name for record in seen]

    @contextmanager
    def watched_or_not(model: nn.Module, n: int):  # type: ignore[no-untyped-def]
        if n == 3:
            yield None  # a thread that watches nothing, among others that do
        else:
            with regard.watch(model) as seen:
                yield seen

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["inner.layers.0.self_attn", "inner.layers.1.self_attn", ""]
    assert found == {0: names, 1: names, 2: names, 3: []}
    assert models[0].config._attn_implementation == "hidden"
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
