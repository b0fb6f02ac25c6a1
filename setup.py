"""Build the native CPU kernels: csrc/kernels.cpp once per instruction set, and the binding to torch, as one library.

All other metadata is in pyproject.toml. Without a compiler, the package is installed without the library; the file
_native.txt in its place says why, and `regard doctor` shows it.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path("csrc")
# Optimized, without -ffast-math; hidden visibility, since the library only registers operators.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
# Flags per value of REGARD_SANITIZE, for tests: a fault ends the process and is reported with its source line.
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZE = os.environ.get("REGARD_SANITIZE", "")
if SANITIZE not in SANITIZERS:
    raise SystemExit(f"REGARD_SANITIZE must be one of {', '.join(filter(None, SANITIZERS))}, got {SANITIZE!r}")
if SANITIZE:
    FLAGS += [*SANITIZERS[SANITIZE], "-O1", "-g1", "-fno-omit-frame-pointer", "-DREGARD_SANITIZED"]
# Code of different sets must not be merged by the linker, so the kernels use no exceptions, RTTI or standard library.
KERNEL_FLAGS = [
    *FLAGS, "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized",
]  # fmt: skip
# The flags of each instruction set; the baseline is supported by every machine of the architecture.
SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SETS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ]  # fmt: skip
    SETS["avx512_bf16"] = [*SETS["avx512"], "-mavx512bf16"]


class Build(build_ext):
    """Compile the kernels once per instruction set and link everything into one library."""

    def build_extension(self, ext: Extension) -> None:
        if SANITIZE and self.inplace:
            raise SystemExit("a sanitized library would replace the installed one: pass --build-lib")
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.parent / "_native.txt"
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, note):
            stale.unlink(missing_ok=True)
        try:
            self._build(library)
        except Exception as error:
            if SANITIZE:
                raise
            note.write_text(f"{type(error).__name__}: {error}\n")
            print(f"regard is installed without native kernels: {error}")

    def _build(self, library: Path) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        with ThreadPoolExecutor() as pool:
            built = dict(zip(SETS, pool.map(self._set, SETS), strict=True))
        flags = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", *[f"-I{path}" for path in include_paths()]]
        flags += [f"-DREGARD_HAS_{name.upper()}" for name, path in built.items() if path]
        objects = [self._compile("bind.cpp", "bind", flags), *[path for path in built.values() if path]]
        self.compiler.link_shared_object(
            objects,
            str(library),
            libraries=["torch_cpu"],
            library_dirs=library_paths(),
            target_lang="c++",
            extra_postargs=SANITIZERS[SANITIZE],
        )

    def _set(self, name: str) -> str | None:
        """Compile the kernels of a set; return None if the compiler does not support it."""
        try:
            return self._compile("kernels.cpp", name, [*KERNEL_FLAGS, f"-DREGARD_SET={name}", *SETS[name]])
        except Exception as error:
            if name == "baseline":
                raise
            print(f"regard is built without {name}: {error}")
            return None

    def _compile(self, source: str, name: str, flags: list[str]) -> str:
        folder = Path(self.build_temp) / name
        (path,) = self.compiler.compile([str(SOURCE / source)], output_dir=str(folder), extra_postargs=flags)
        return path


setup(
    ext_modules=[Extension("regard._native", ["csrc/bind.cpp"], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
