"""C++ for CPUs, compiled when first needed (build.py): training (bindings, fused_layers) and decoding
(decode_step)."""

from kernels.cpu.build import Unavailable, call, compile_training, library, require, trains

__all__ = ["Unavailable", "call", "compile_training", "library", "require", "trains"]
