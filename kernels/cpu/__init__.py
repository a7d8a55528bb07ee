"""C++ for CPUs: compiled when first needed (build.py), to train (train_ops) and to decode (decode_step)."""

from kernels.cpu.build import Unavailable, call, library, require, training, trains

__all__ = ["Unavailable", "call", "library", "require", "training", "trains"]
