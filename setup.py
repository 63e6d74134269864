"""Builds native/*.cpp into `fallow/_native*.so`, a plain C library (no Python or PyTorch symbols) that ctypes loads.

Everything else about the package is in pyproject.toml. The extension is optional: without a C++17 compiler the install
succeeds, and fallow runs its pure PyTorch paths and says so (`fallow doctor`). No -march flag: instruction sets are
chosen at run time.
"""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(HERE)) for p in (HERE / "native").glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(HERE)) for p in (HERE / "native").glob("*.h"))

setup(
    ext_modules=[
        Extension(
            "fallow._native",
            sources=SOURCES,
            depends=HEADERS,
            language="c++",
            # contract=off: fused multiply-adds only where the source asks; no-math-errno and no-trapping-math let loops
            # vectorise
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-pthread",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
