"""C++ for CPUs: compiled when first needed (build.py), to train (train_ops, fused_layers) and to decode (decode_step)."""

from kernels.cpu.build import Unavailable, call, library, require, trains

__all__ = ["Unavailable", "call", "library", "require", "trains"]
