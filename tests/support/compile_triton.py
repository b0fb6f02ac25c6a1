"""Compile the Triton kernels without a GPU: `python tests/support/compile_triton.py ARCHITECTURE [NAME ...]`.

ARCHITECTURE is a number such as 90. Triton's compiler and NVIDIA's assembler, which comes with it, need no GPU. Prints
one line of JSON per kernel:

    registers            registers per thread
    spilled              bytes of stack per thread
    spills in loops      instructions in loops that access local memory
    loops                instructions of each loop, including those of inner loops
    shared               bytes of shared memory
    products, powers     instructions of the matrix units, and exponentials (in PTX)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from regard import mask, normalizer, position, score
from regard.backends.triton import additive_backward_kernels as additive_backward
from regard.backends.triton import backend, launch, tuning
from regard.components.summary import Summary
from regard.plan import nonfinite
from regard.plan.assemble import make_problem

_L = 512
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """A driver that answers what Triton asks before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(kernel: Any, grid: tuple[int, ...], config: tuning.LaunchConfig, *arguments: Any) -> None:
    """Compile a kernel and print a line about it. Replaces `regard.backends.triton.call.launch_kernel`."""
    compiled = kernel.warmup(
        *arguments, grid=grid, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage_text, code = (_dump(file.name, option) for option in ("-res-usage", "-sass"))
    loops, spills = _loops(code)
    usage = dict(part.split(":") for part in usage_text.split() if part.count(":") == 1 and part[0] in "RS")
    ptx = compiled.asm["ptx"]
    report = {
        "kernel": kernel.__name__,
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]),
        "spills in loops": spills,
        "loops": loops,
        "shared": compiled.metadata.shared,
        "products": ptx.count("wgmma.mma_async.sync") + ptx.count("mma.sync"),
        "powers": ptx.count("ex2.approx"),
    }
    print(json.dumps(report), flush=True)


def _dump(file: str, option: str) -> str:
    return subprocess.run([_TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> tuple[list[int], int]:
    """Return the number of instructions of each loop, and how many instructions in loops access local memory.

    A loop is the code between a backward branch and its target.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)]
    back = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"BRA.*?(0x[0-9a-f]+)", text))]
    loops = [(first, last) for first, last in back if first < last]
    spills = [at for at, text in lines if re.search(r"\b(STL|LDL)\b", text)]
    counts = [sum(first <= at <= last for at, _ in lines) for first, last in loops]
    return counts, sum(any(first <= at <= last for first, last in loops) for at in spills)


def _run(dtype: torch.dtype = torch.bfloat16, D: int = 64, L: int = _L, G: int = 2, **arguments: Any) -> None:
    """Run the forward pass and, without a summary, the backward pass."""
    q = torch.randn(1, 4, L, D).to(dtype).requires_grad_()
    k, v = (torch.randn(1, G, _L, D).to(dtype).requires_grad_() for _ in range(2))
    names = ("score", "normalizer", "mask", "bias", "softcap", "dropout", "seed", "summary")
    arguments = {**dict.fromkeys(names), "dropout": 0.0, **arguments}
    plan, tensors, *_ = make_problem(q, k, v, *[arguments[name] for name in names], masks_nonfinite=True)
    out, *rest = backend.forward(plan, tensors)
    if plan.summary.outputs:
        return
    backend.backward(
        plan, tensors, (out, *rest[-2:]), (torch.randn_like(out),), [x.is_floating_point() for x in tensors]
    )


CASES: dict[str, Callable[[], None]] = {
    "plain": _run,
    "causal": lambda: _run(mask=mask.causal()),
    "causal, 128": lambda: _run(D=128, mask=mask.causal()),
    "float32": lambda: _run(torch.float32),
    "float16": lambda: _run(torch.float16),
    "every mask": lambda: _run(
        mask=mask.causal() & mask.documents(torch.arange(_L) // 99) & mask.lengths([300])
        | mask.blocks(torch.ones(1, 1, 8, 8, dtype=torch.bool)) & mask.dense(torch.ones(_L, _L, dtype=torch.bool))
    ),
    "ALiBi, softcap, dropout": lambda: _run(
        bias=position.ALiBi(), mask=mask.causal(), softcap=30.0, dropout=0.1, seed=3
    ),
    "T5": lambda: _run(bias=position.T5(torch.randn(32, 4, requires_grad=True))),
    "bias": lambda: _run(bias=torch.randn(1, 1, _L, _L, requires_grad=True)),
    "bias of keys": lambda: _run(bias=torch.randn(1, 1, 1, _L, requires_grad=True)),
    "sink": lambda: _run(normalizer=normalizer.Softmax(sink=torch.randn(4, requires_grad=True))),
    "sigmoid": lambda: _run(normalizer=normalizer.Sigmoid(torch.randn(4, requires_grad=True))),
    "distance": lambda: _run(score=score.Distance()),
    "entropy": lambda: _run(mask=mask.causal(), summary=Summary(entropy=True, lse=True, max=True)),
    "top": lambda: _run(mask=mask.causal(), summary=Summary(top=8)),
    "afterwards": lambda: _run(
        summary=Summary(received=True, rows=(1, 2), full=True, mass=torch.ones(3, _L, dtype=torch.bool))
    ),
    "one query": lambda: _run(L=1, G=1, mask=mask.causal("end")),
    "wide": lambda: _run(D=256, mask=mask.causal(), bias=torch.randn(1, 1, _L, _L)),
    "one query, wide": lambda: _run(torch.float32, D=256, L=1, G=1, summary=Summary(lse=True)),
    "additive": lambda: _run(torch.float32, score=score.Additive(torch.randn(64, requires_grad=True))),
    "additive, causal": lambda: _run(mask=mask.causal(), score=score.Additive(torch.randn(4, 64, requires_grad=True))),
}


def main(architecture: int, *names: str) -> None:
    """Compile the named cases; all by default."""
    triton.runtime.driver.set_active(Driver(architecture))
    tuning._architecture = lambda device: divmod(architecture, 10)  # type: ignore[assignment]
    tuning.max_programs = lambda device: 264
    launch.launch_kernel = additive_backward.launch_kernel = compile_only
    nonfinite.are_finite = lambda *x: False  # type: ignore[assignment]  # on a GPU, checking would wait for it
    for name in names or CASES:
        print(json.dumps({"case": name}), flush=True)
        CASES[name]()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
