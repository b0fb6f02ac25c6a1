"""Attention under autocast, from several threads at once, and in a process that was forked after use."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.budget import assert_within_budget
from support.calls import native_calls, python_calls
from support.compare import BACKENDS, compute_reference, evaluate_oracle, new_leaves
from support.paths import ROOT, TESTS
from support.problems import fixed_choices, make_problem
from torch import Tensor

import regard
from regard import score

_PLAIN: dict[str, Any] = {
    "dtype": torch.bfloat16, "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 8, "E": 8, "normalizer": "softmax", "mask": None,
    "bias": None, "softcap": None, "dropout": 0.0, "nonfinite": None, "summary": "lse", "size": 1.0, "shift": 0.0, "maps": "both",
    "parameters": torch.float32, "with a sink": True, "sink": "per head",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("name", ["scaled_dot", "bilinear", "additive", "gaussian", "closure"])
def test_autocast_equals_half_precision_call(kernel: str, name: str, dtype: torch.dtype) -> None:
    """The inputs are rounded, as those of torch's attention; parameters and sums stay in float32."""
    problem = make_problem(fixed_choices({**_PLAIN, "dtype": dtype, "score": name}))
    told = compute_reference(problem)
    leaves = {n: x.detach().float().requires_grad_() for n, x in new_leaves(problem).items()}
    with regard.record_backends() as ran, torch.autocast("cpu", dtype):
        out, seen = regard.attention(**problem.arguments(leaves), backend=kernel)
        expected = torch.nn.functional.scaled_dot_product_attention(*[leaves["q"]] * 3)
    assert ran == [kernel]
    assert out.dtype == expected.dtype == dtype
    assert seen.lse.dtype == torch.float32
    assert_within_budget("out", out, told.outputs["out"])
    assert_within_budget("lse", seen.lse, told.outputs["lse"])
    weights = [told.cotangents["out"].to(dtype), told.cotangents["lse"].float()]
    gradients = torch.autograd.grad([out, seen.lse], list(leaves.values()), weights)
    for (n, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        # The gradients of the inputs pass through half precision, where they were rounded.
        assert_within_budget(f"gradient of {n}", gradient.to(dtype) if n in "qkv" else gradient, told.gradients[n])


def test_autocast_does_not_change_backward() -> None:
    for kernel in BACKENDS:
        q, k, v = (torch.randn(1, 2, 67, 8, requires_grad=True) for _ in range(3))
        out = regard.attention(q, k, v, score=score.Additive(torch.randn(8)), backend=kernel)
        plain = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            under = torch.autograd.grad(out.sum(), (q, k, v))
        if kernel != "reference":  # whose backward is made of torch's own steps
            assert all(torch.equal(x, y) for x, y in zip(plain, under, strict=True))


def test_autocast_does_not_change_float64() -> None:
    problem = make_problem(fixed_choices({**_PLAIN, "dtype": torch.float64, "score": "scaled_dot"}))
    found, _ = evaluate_oracle(problem, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = regard.attention(**problem.arguments(new_leaves(problem)))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, found["out"])


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes.


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("native", [False, True])
def test_eight_concurrent_threads(native: bool) -> None:
    calls = native_calls() if native else python_calls()
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
    """Put results of a forked process into its queue."""
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
    # As torch's own workers do: the threads of OpenMP do not survive a fork, and operators of torch would wait for them.
    torch.set_num_threads(1)
    queue.put([[x.numpy() for x in call()] for call in python_calls()])


@pytest.mark.usefixtures("several_threads")
def test_forked_process() -> None:
    """Calls return the same results in a child of a process that has used every thread."""
    expected = [call() for call in python_calls()]
    for x, y in zip(_by_a_child(_in_child), expected, strict=True):
        for got, told in zip(x, y, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), told, rtol=1e-5, atol=1e-5)


def _alone() -> list[Callable[[], list[Tensor]]]:
    """Calls that the native kernels serve without large operations of torch."""
    calls = native_calls()
    return [calls[i] for i in (0, 1, 4, 5, 6, 7)]  # keys whose distance counts are first moved to their mean, by torch


def _in_child_alone(queue: Any) -> None:
    queue.put([[x.numpy() for x in call()] for call in _alone()])


@pytest.mark.usefixtures("several_threads")
def test_forked_native_kernels_do_not_deadlock() -> None:
    """Whatever their number, which torch's own operators wait for until they are told that it is 1. The bits are the same."""
    expected = [call() for call in _alone()]
    for x, y in zip(_by_a_child(_in_child_alone), expected, strict=True):
        assert all(torch.equal(torch.from_numpy(got), told) for got, told in zip(x, y, strict=True))


_DIGEST = """
import hashlib, sys
import torch
sys.path.insert(0, sys.argv[1])
from support.calls import native_calls

torch.set_num_threads(3)
digest = hashlib.sha256()
for call in native_calls():
    for x in call():
        digest.update(x.numpy().tobytes())
print(digest.hexdigest())
"""


def test_processes_are_bitwise_equal() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST, str(TESTS)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        ).stdout
        for _ in range(3)
    }  # fmt: skip
    assert len(digests) == 1
