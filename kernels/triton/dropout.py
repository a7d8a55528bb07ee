"""Device functions for dropout of attention weights: the same bits as kernels/dropout.py, which defines them."""

import triton
import triton.language as tl


@triton.jit
def row_hashes(seed, head, query):  # type: ignore[no-untyped-def]
    """Salt and factor of each row, in the shape of `query`."""
    head, query = head.to(tl.uint32), query.to(tl.uint32)
    salt = mix(mix(mix(tl.load(seed).to(tl.uint32)) + head) + query)
    factor = mix(mix(mix(tl.load(seed + 1).to(tl.uint32)) + head) + query)
    return salt, factor | 1


@triton.jit
def keep(row, key, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which weights are kept, by the hashes of their rows. DROPPED: how many of the 2**32 numbers drop a weight."""
    salt, factor = row
    number = mix((salt ^ key.to(tl.uint32)) * factor)
    return number.to(tl.int32, bitcast=True) >= DROPPED - 2147483648


@triton.jit
def mix(x):  # type: ignore[no-untyped-def]
    """The finalizer of MurmurHash3, of uint32 numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
