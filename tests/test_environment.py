"""Attention under autocast, from several threads at once, and in a process that was forked after use."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import check
from judge import KERNELS, fresh, solved, truth
from problems import decided, make
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score

_PLAIN: dict[str, Any] = {
    "dtype": torch.bfloat16, "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 8, "E": 8, "normalizer": "softmax", "mask": None,
    "bias": None, "softcap": None, "dropout": 0.0, "wild": None, "summary": "lse", "size": 1.0, "shift": 0.0, "maps": "both",
    "parameters": torch.float32, "with a sink": True, "sink": "per head",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["scaled_dot", "bilinear", "additive", "gaussian", "closure"])
def test_autocast_is_a_call_in_half_precision(kernel: str, name: str, dtype: torch.dtype) -> None:
    """The inputs are rounded, as those of torch's own attention are; parameters and sums stay in float32."""
    problem = make(decided({**_PLAIN, "dtype": dtype, "score": name}))
    told = truth(problem)
    leaves = {n: x.detach().float().requires_grad_() for n, x in fresh(problem).items()}
    with regard.chosen() as ran, torch.autocast("cpu", dtype):
        out, seen = regard.attention(**problem.ask(leaves), kernel=kernel)
        expected = torch.nn.functional.scaled_dot_product_attention(*[leaves["q"]] * 3)
    assert ran == [kernel]
    assert out.dtype == expected.dtype == dtype
    assert seen.lse.dtype == torch.float32
    check("out", out, told.outputs["out"])
    check("lse", seen.lse, told.outputs["lse"])
    weights = [told.cotangents["out"].to(dtype), told.cotangents["lse"].float()]
    gradients = torch.autograd.grad([out, seen.lse], list(leaves.values()), weights)
    for (n, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        # The gradients of the inputs pass through half precision, where they were rounded.
        check(f"gradient of {n}", gradient.to(dtype) if n in "qkv" else gradient, told.gradients[n])


def test_autocast_in_the_backward_pass_changes_nothing() -> None:
    for kernel in KERNELS:
        q, k, v = (torch.randn(1, 2, 67, 8, requires_grad=True) for _ in range(3))
        out = regard.attention(q, k, v, score=score.Additive(torch.randn(8)), kernel=kernel)
        plain = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            under = torch.autograd.grad(out.sum(), (q, k, v))
        if kernel != "reference":  # whose backward is made of torch's own steps
            assert all(torch.equal(x, y) for x, y in zip(plain, under, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    problem = make(decided({**_PLAIN, "dtype": torch.float64, "score": "scaled_dot"}))
    found, _ = solved(problem, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = regard.attention(**problem.ask(fresh(problem)))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, found["out"])


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes.


def _calls() -> list[Callable[[], list[Tensor]]]:
    """Eight different calls, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    words: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Additive(torch.randn(6, generator=generator))},
        {"normalizer": normalizer.Entmax(1.5), "mask": mask.window(9, 9)},
        {"score": score.Distance(), "softcap": 2.0},
        {"score": lambda q, k: torch.sin(q @ k.mT)},
        {"dropout": 0.5, "seed": 3, "mask": mask.where(lambda b, h, i, j: (i + j) % 3 > 0)},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(100, generator=generator)},
    ]

    return [_call(word, "reference" if i == 2 else "tiled", i) for i, word in enumerate(words)]


def _native_calls() -> list[Callable[[], list[Tensor]]]:
    """The same by the native kernels, long enough for every thread."""
    generator = torch.Generator().manual_seed(1)
    words: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Gaussian(1.5)},
        {"score": score.Distance(), "mask": mask.window(90, 9)},
        {"softcap": 2.0, "bias": position.ALiBi()},
        {"normalizer": normalizer.Softmax(sink=0.5), "mask": mask.lengths(torch.tensor([300, 77]))},
        {"dropout": 0.5, "seed": 3},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(300, generator=generator)},
    ]
    return [_call(word, "cpu", i, 300) for i, word in enumerate(words)]


def _call(word: dict[str, Any], kernel: str, seed: int, length: int = 100) -> Callable[[], list[Tensor]]:
    own = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 3, length, 6, generator=own) for _ in range(3)]

    def run() -> list[Tensor]:
        x = [y.clone().requires_grad_() for y in inputs]
        with regard.chosen() as ran:
            answer = regard.attention(*x, kernel=kernel, **word)
        assert ran == [kernel]
        out = answer if isinstance(answer, Tensor) else answer[0]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    return run


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("native", [False, True])
def test_eight_threads_at_once(native: bool) -> None:
    calls = _native_calls() if native else _calls()
    expected = [call() for call in calls]
    start, wrong = threading.Barrier(len(calls)), []

    def work(i: int) -> None:
        try:
            start.wait(timeout=30)
            for _ in range(5):
                found = calls[i]()
                for x, y in zip(found, expected[i], strict=True):
                    assert torch.equal(x, y) or not native
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        except BaseException as error:
            wrong.append((i, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def _by_a_child(target: Callable[[Any], None]) -> Any:
    """What a forked process puts into its queue."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=target, args=(queue,))
    child.start()
    try:
        return queue.get(timeout=60)
    finally:
        child.join(timeout=10)
        child.kill()


def _in_child(queue: Any) -> None:
    # As torch's own workers do: the threads of OpenMP did not come along, and any operator of torch would wait for them.
    torch.set_num_threads(1)
    queue.put([[x.numpy() for x in call()] for call in _calls()])


@pytest.mark.usefixtures("several_threads")
def test_a_process_that_was_forked_after_use() -> None:
    """Calls come back, and with the same numbers, in a child of a process that has used every thread already."""
    expected = [call() for call in _calls()]
    for x, y in zip(_by_a_child(_in_child), expected, strict=True):
        for got, told in zip(x, y, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), told, rtol=1e-5, atol=1e-5)


def _alone() -> list[Callable[[], list[Tensor]]]:
    """Calls that the native kernels make without steps of torch on many numbers."""
    calls = _native_calls()
    return [calls[i] for i in (0, 1, 4, 5, 6, 7)]  # keys whose distance counts are first moved to their mean, by torch


def _in_child_alone(queue: Any) -> None:
    queue.put([[x.numpy() for x in call()] for call in _alone()])


@pytest.mark.usefixtures("several_threads")
def test_native_kernels_do_not_wait_for_threads_that_did_not_come_along() -> None:
    """Whatever their number, which torch's own operators wait for until they are told that it is 1. The bits are the same."""
    expected = [call() for call in _alone()]
    for x, y in zip(_by_a_child(_in_child_alone), expected, strict=True):
        assert all(torch.equal(torch.from_numpy(got), told) for got, told in zip(x, y, strict=True))


_DIGEST = """
import hashlib, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_environment import _native_calls

torch.set_num_threads(3)
digest = hashlib.sha256()
for call in _native_calls():
    for x in call():
        digest.update(x.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_in_every_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST, str(Path(__file__).parent)],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
        ).stdout
        for _ in range(3)
    }  # fmt: skip
    assert len(digests) == 1
