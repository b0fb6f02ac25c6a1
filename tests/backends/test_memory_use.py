"""Peak memory of `tiled` is linear in length, forward and backward; repeated calls of the native kernels do not leak."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

_CHILD = """
import resource, sys
import torch, regard
from regard import Summary, mask, normalizer, score

slope = torch.tensor(-0.1, requires_grad=True)

@torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
def compiled(q, k, v):
    causal = mask.where(lambda b, h, i, j: i >= j)
    return regard.attention(q, k, v, score=lambda q, k: q @ k.mT, bias=lambda b, h, i, j: slope * (i - j).abs(), mask=causal)

def run(L):
    q, k, v = (torch.randn(1, 1, L, 16, requires_grad=True) for _ in range(3))
    words = {
        "causal": lambda: dict(mask=mask.causal()),
        "summaries": lambda: dict(summary=Summary(lse=True, entropy=True, top=4, received=True, rows=(0,))),
        "entmax": lambda: dict(normalizer=normalizer.Entmax(1.5)),
        "additive": lambda: dict(score=score.Additive(torch.randn(16))),
        "python": lambda: dict(score=lambda q, k: q @ k.mT, bias=lambda b, h, i, j: slope * (i - j).abs()),
        "compiled": lambda: {},
    }[sys.argv[1]]()
    out = compiled(q, k, v) if sys.argv[1] == "compiled" else regard.attention(q, k, v, backend="tiled", **words)
    out = out[0].sum() + out[1].entropy.sum() + out[1].received.square().sum() if isinstance(out, tuple) else out.sum()
    out.backward()

torch.set_num_threads(1)
run(256)  # what the first call sets up is not the problem's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for L in sys.argv[2:]:
    run(int(L))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def _peaks(what: str, lengths: tuple[int, ...]) -> list[int]:
    """Bytes by which a forward and backward of growing lengths raises the peak of a fresh process. What is freed goes back
    at once, so that the peak is of what is held and not of what the allocator keeps."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, what, *map(str, lengths)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    return [int(line) for line in done.stdout.split()]


# Additive attention takes 16 tanh per pair: it is measured at a shorter length.
@pytest.mark.parametrize(
    "what",
    [
        "causal",
        "compiled",
        *[pytest.param(x, marks=pytest.mark.slow) for x in ("summaries", "entmax", "additive", "python")],
    ],
)
def test_peak_memory_is_linear_in_length(what: str) -> None:
    lengths = {"additive": (512, 1024, 2048), "compiled": (1024, 2048, 4096)}.get(what, (2048, 4096, 8192))
    peaks = _peaks(what, lengths)
    # Everything held is small compared with one matrix of the last length, with 16 elements per pair for additive scores.
    matrix = 4 * lengths[-1] ** 2 * (16 if what == "additive" else 1)
    assert peaks[-1] < matrix / 3, peaks
    # Twice the length takes at most twice the memory, and a little for the allocator; a matrix would take four times.
    assert peaks[2] - peaks[1] < 2.6 * max(peaks[1] - peaks[0], 8 << 20), peaks


_MANY = """
import os, sys
import torch, regard
from regard import Summary, mask, normalizer, position, score

torch.set_num_threads(1)
q, k, v = (torch.randn(1, 2, n, 8) for n in (9, 17, 17))
slopes = torch.tensor([0.5, 0.25], requires_grad=True)
words = [
    {},
    {"mask": mask.causal("end") & ~mask.dense(torch.rand(9, 17) < 0.2), "summary": Summary(lse=True, entropy=True, top=3)},
    {"score": score.Cosine(0.1), "bias": position.ALiBi(slopes, "end"), "dropout": 0.1, "seed": 1},
    {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(9, 17), "summary": Summary(received=True)},
]

def forward(word):
    with torch.no_grad():
        regard.attention(q, k, v, backend="cpu", **word)

def both(word):
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    answer = regard.attention(*x, backend="cpu", **word)
    out = answer[0] if isinstance(answer, tuple) else answer
    torch.autograd.grad(out.sum(), [*x, slopes], allow_unused=True)

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

call = {"forward": forward, "both": both}[sys.argv[1]]
for n in range(5000):  # until the allocator has laid its heap out
    call(words[n % len(words)])
before = held()
for n in range(10_000):
    call(words[n % len(words)])
print(held() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "both"])
def test_repeated_calls_do_not_leak_memory(what: str) -> None:
    """After ten thousand calls, a process is as large as before them: what leaks is less than 50 bytes a call."""
    done = subprocess.run(
        [sys.executable, "-c", _MANY, what],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert int(done.stdout) < 512 << 10
