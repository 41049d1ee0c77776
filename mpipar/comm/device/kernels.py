"""What runs on the GPU: two kernels, compiled for a dtype when they are first wanted.

`add` is bound by memory: each thread takes 16 bytes of every row at a time, so that a warp asks for whole lines, adds
them in registers, and writes the sum where it belongs. Rows that begin off a 16-byte boundary have their first elements
taken one by one; a result at another distance from a boundary than the rows is made one by one altogether.

Nothing is included: 16-bit floats are converted by instructions and by hand, so no CUDA headers have to be installed.
"""

from __future__ import annotations

from mpipar.comm.device.runtime import Addition

NOTHING = 'extern "C" __global__ void nothing() {}'
"""Whether kernels can be compiled and loaded at all."""

THREADS = 256
BLOCKS_PER_PROCESSOR = 16
VECTOR_BYTES = 16

_TYPES = {
    "float16": "unsigned short",
    "bfloat16": "unsigned short",
    "float32": "float",
    "float64": "double",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
}
_WIDER = {"float16": "float", "bfloat16": "float"}


def addition_options(addition: Addition) -> tuple[str, ...]:
    """What the kernel `add` is compiled with."""
    wide = _WIDER.get(addition.dtype, _TYPES[addition.dtype])
    return (
        f"-DSOURCE_{addition.dtype}",
        f"-DINTO_{addition.into}",
        f"-DSOURCE={_TYPES[addition.dtype]}",
        f"-DINTO={_TYPES[addition.into]}",
        f"-DWIDE={wide}",
        f"-DVECTOR={VECTOR_BYTES}",
        *(["-DMAXIMUM"] if addition.op == "max" else []),
        *(["-DMEAN"] if addition.op == "mean" else []),
    )


def rounding_options(dtype: str) -> tuple[str, ...]:
    """What the kernel `round_and_add` is compiled with, for contributions of this dtype."""
    return f"-DSOURCE_{dtype}", f"-DSOURCE={_TYPES[dtype]}", f"-DWIDE={_WIDER.get(dtype, _TYPES[dtype])}"


def elements_one_by_one(addition: Addition, itemsize: int) -> int:
    """How many elements come before the first whole vector: all, if rows and result have no boundary in common."""
    targets = [addition.out] if addition.out is not None else [row + addition.target for row in addition.rows]
    starts = {address % VECTOR_BYTES for address in (*(row + addition.source for row in addition.rows), *targets)}
    start = min(starts)
    if addition.dtype != addition.into or len(starts) > 1 or start % itemsize:
        return addition.size
    return min(addition.size, -start % VECTOR_BYTES // itemsize)


_CONVERSIONS = r"""
typedef long long i64;
typedef unsigned long long u64;

__device__ __forceinline__ float from_half(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ unsigned short to_half(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_bfloat(unsigned short x) {
    return __uint_as_float((unsigned int)x << 16);
}

__device__ __forceinline__ unsigned short to_bfloat(float x) {  // to the nearest, ties to even
    unsigned int bits = __float_as_uint(x);
    if (x != x) return (unsigned short)((bits >> 16) | 0x40);  // rounding could make an infinity of it
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ __forceinline__ WIDE widen(SOURCE x) {
#if defined(SOURCE_float16)
    return from_half(x);
#elif defined(SOURCE_bfloat16)
    return from_bfloat(x);
#else
    return x;
#endif
}
"""

ADD = (
    _CONVERSIONS
    + r"""
__device__ __forceinline__ INTO narrow(WIDE x) {
#if defined(INTO_float16)
    return to_half((float)x);
#elif defined(INTO_bfloat16)
    return to_bfloat((float)x);
#else
    return (INTO)x;
#endif
}

__device__ __forceinline__ WIDE combine(WIDE x, WIDE y) {
#if defined(MAXIMUM)
    return x > y || x != x ? x : y;  // a NaN on either side stays
#else
    return x + y;
#endif
}

__device__ __forceinline__ INTO finish(WIDE x, double factor) {
#if defined(MEAN)
    x *= (WIDE)factor;
#endif
    return narrow(x);
}

#define PER_VECTOR (VECTOR / (i64)sizeof(SOURCE))

struct __align__(VECTOR) Sources { SOURCE at[PER_VECTOR]; };
struct __align__(VECTOR) Results { INTO at[PER_VECTOR]; };  // read and written as such where INTO is SOURCE

// Element i of every row, at `source`, becomes one sum; `out`, or where that is 0 every row at `target`, gets it.
extern "C" __global__ void add(
    const u64* table, i64 rows, i64 source, i64 target, u64 out, i64 size, i64 head, double factor
) {
    const i64 first = blockIdx.x * (i64)blockDim.x + threadIdx.x, step = gridDim.x * (i64)blockDim.x;
    const i64 vectors = (size - head) / PER_VECTOR;
    for (i64 i = first; i < vectors; i += step) {
        const i64 element = head + i * PER_VECTOR;
        WIDE sum[PER_VECTOR];
        const Sources x = *(const Sources*)(table[0] + source + element * sizeof(SOURCE));
#pragma unroll
        for (int k = 0; k < PER_VECTOR; k++) sum[k] = widen(x.at[k]);
#pragma unroll 4
        for (i64 row = 1; row < rows; row++) {
            const Sources y = *(const Sources*)(table[row] + source + element * sizeof(SOURCE));
#pragma unroll
            for (int k = 0; k < PER_VECTOR; k++) sum[k] = combine(sum[k], widen(y.at[k]));
        }
        Results result;
#pragma unroll
        for (int k = 0; k < PER_VECTOR; k++) result.at[k] = finish(sum[k], factor);
        if (out) {
            *(Results*)(out + element * sizeof(INTO)) = result;
        } else {
            for (i64 row = 0; row < rows; row++)
                *(Results*)(table[row] + target + element * sizeof(INTO)) = result;
        }
    }
    // What comes before the first vector, and behind the last one.
    const i64 tail = head + vectors * PER_VECTOR, singles = head + (size - tail);
    for (i64 i = first; i < singles; i += step) {
        const i64 element = i < head ? i : tail + (i - head);
        WIDE sum = widen(*(const SOURCE*)(table[0] + source + element * sizeof(SOURCE)));
        for (i64 row = 1; row < rows; row++)
            sum = combine(sum, widen(*(const SOURCE*)(table[row] + source + element * sizeof(SOURCE))));
        const INTO result = finish(sum, factor);
        if (out) {
            *(INTO*)(out + element * sizeof(INTO)) = result;
        } else {
            for (i64 row = 0; row < rows; row++) *(INTO*)(table[row] + target + element * sizeof(INTO)) = result;
        }
    }
}
"""
)
"""Args: table, rows, source, target, out or 0, size, elements one by one at the beginning, a mean's factor."""

ROUND_AND_ADD = (
    _CONVERSIONS
    + r"""
// The magnitudes of doubles are ordered as their bits are, infinity above all numbers and NaN above that.
extern "C" __global__ void round_and_add(
    double* total, const SOURCE* x, i64 size, double anchor, i64 is_first, u64* largest
) {
    const i64 first = blockIdx.x * (i64)blockDim.x + threadIdx.x, step = gridDim.x * (i64)blockDim.x;
    u64 most = 0;
    for (i64 i = first; i < size; i += step) {
        const double value = (double)widen(x[i]);
        const double rounded = __dadd_rn(__dadd_rn(value, anchor), -anchor);
        total[i] = is_first ? rounded : __dadd_rn(total[i], rounded);
        const u64 magnitude = __double_as_longlong(value) & 0x7fffffffffffffffULL;
        most = magnitude > most ? magnitude : most;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(0xffffffffu, most, distance);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0 && most) atomicMax(largest, most);
}
"""
)
"""Args: total, contribution, size, anchor, whether it is the first, the largest magnitude so far."""
