"""The kernels themselves, compiled for the processor: one thread after the other, each a block of its own.

A warp of one thread has nobody to exchange values with; everything else is the code that a GPU runs.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mpipar.comm.device import kernels
from mpipar.comm.device.runtime import Addition, Rounding

COMPILER = shutil.which("c++")

_THREADS = 7  # as many as there are, each takes every seventh vector

_CUDA = r"""
#include <cmath>
#include <cstring>
#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __shfl_xor_sync(mask, value, distance) (value)
#define asm(...) convert(y, x)
struct Index { long long x; };
static Index blockIdx, threadIdx = {0}, blockDim = {1}, gridDim;
template <class To, class From> To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
static long long __double_as_longlong(double x) { return bits<long long>(x); }
static double __dadd_rn(double x, double y) { return x + y; }
static void atomicMax(unsigned long long* at, unsigned long long x) { if (x > *at) *at = x; }
static void convert(float& y, unsigned short x) {  // what cvt.f32.f16 does
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    y = exponent == 31 ? (mantissa ? NAN : INFINITY)
        : exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    if (x >> 15) y = -y;
}
static void convert(unsigned short& y, float x) {  // what cvt.rn.f16.f32 does
    const float size = std::fabs(x);
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) { y = 0x7fff; return; }
    if (size >= 65520.f) { y = sign | 0x7c00; return; }
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const int steps = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // of the last bit
    y = sign | (unsigned short)(steps + ((exponent + 14) << 10));
}
"""


class Compiled:
    """Kernels, as they are wanted.

    Args:
        folder: Where they are compiled.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._libraries: dict[tuple[str, ...], Any] = {}

    def add(self, addition: Addition) -> None:
        """The kernel `add`."""
        rows = (ctypes.c_uint64 * len(addition.rows))(*addition.rows)
        itemsize = addition_itemsize(addition.dtype)
        integers = [
            ctypes.addressof(rows),
            len(rows),
            addition.source,
            addition.target,
            addition.out or 0,
            addition.size,
            kernels.elements_one_by_one(addition, itemsize),
        ]
        arguments = [*map(ctypes.c_int64, integers), ctypes.c_double(1 / len(rows))]
        self._run(kernels.ADD, "add", kernels.addition_options(addition), arguments)

    def round_and_add(self, rounding: Rounding) -> None:
        """The kernel `round_and_add`."""
        arguments = [
            *map(ctypes.c_int64, (rounding.total, rounding.x, rounding.size)),
            ctypes.c_double(rounding.anchor),
            ctypes.c_int64(rounding.first),
            ctypes.c_int64(rounding.largest),
        ]
        self._run(kernels.ROUND_AND_ADD, "round_and_add", kernels.rounding_options(rounding.dtype), arguments)

    def _run(self, code: str, name: str, options: tuple[str, ...], arguments: list[Any]) -> None:
        key = (name, *options)
        if key not in self._libraries:
            assert COMPILER is not None
            source = self._folder / f"{len(self._libraries)}.cpp"
            access = '\nextern "C" void place(long long i, long long n) { blockIdx.x = i; gridDim.x = n; }\n'
            source.write_text(_CUDA + code + access)
            target = source.with_suffix(".so")
            flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
            subprocess.run([COMPILER, *flags, *options, "-o", target, source], check=True)
            self._libraries[key] = ctypes.CDLL(str(target))
        library = self._libraries[key]
        for thread in range(_THREADS):
            library.place(ctypes.c_int64(thread), ctypes.c_int64(_THREADS))
            library[name](*arguments)


def addition_itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "uint8": 1}.get(dtype, 8)
