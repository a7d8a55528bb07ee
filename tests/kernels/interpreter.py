"""Triton's interpreter made fit to judge kernels by: bfloat16 as a GPU computes it, and every access to memory watched.

`install()` puts bfloat16 right. The interpreter of Triton 3.7.1 keeps it as its 16 bits in numpy's uint16 and computes
with those as if they were integers; its casts truncate. Here operands are widened to fp32, and results are rounded to
nearest, ties to even. A reduction rounds once at its end, which is kinder than a GPU. Atomics in bfloat16 still raise.
Matmuls of fp32 at less than full precision, which only a GPU would make, are refused.

`checked()` is what a sanitizer is elsewhere. Inside, a launch fails with an `AccessError` if a load, store or atomic

- lies outside the elements of the tensor whose pointer it began at (padding between rows counts as its own), or
- touches what another program of the launch touches as well, when one of the two writes: the interpreter runs programs
  one after the other, a GPU in any order. Two atomics may meet.

The first is found before the access happens, so that nothing is corrupted.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# 1. bfloat16 --------------------------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers with these upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """The upper halves, in uint16, of fp32 numbers rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).reshape(np.shape(numbers)).view(np.uint32)
    up = 0x7FFF + (bits >> 16 & 1)  # half a unit, less what keeps a tie at an even number; carries as far as infinity
    return np.where(np.isnan(numbers), bits >> 16 | 0x40, bits + up >> 16).astype(np.uint16)


def is_bf16(x: Any) -> bool:
    """Whether x is a handle to bfloat16. Comparisons keep their operands' type but hold booleans, and are not."""
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _fp32(x: Any) -> Any:
    return TensorHandle(widen(x.data), tl.float32) if is_bf16(x) else x


def _through_fp32(method: Callable) -> Callable:
    """An operation whose result has the type of its last operand, or is boolean."""

    def operation(self, *args):
        operands = [x for x in args if isinstance(x, TensorHandle)]
        if not any(map(is_bf16, operands)):
            return method(self, *args)
        result = method(self, *map(_fp32, args))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(narrow(result.data), tl.bfloat16) if is_bf16(operands[-1]) else result

    return operation


def _cast(method: Callable) -> Callable:
    """Casts from and to bfloat16, by way of fp32."""

    def cast(self, source, to):
        if to.scalar != tl.bfloat16 or is_bf16(source):
            return method(self, source if to.scalar == tl.bfloat16 else _fp32(source), to)
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)

    return cast


def _reduce(method: Callable) -> Callable:
    """Reductions and scans of one tensor or several."""

    def retyped(x, handle):
        return tl.tensor(handle, tl.block_type(handle.dtype, x.shape) if x.type.is_block() else handle.dtype)

    def apply(self, tensors):
        if not isinstance(tensors, tuple):
            return self.apply((tensors,))[0]
        results = method(self, tuple(retyped(x, _fp32(x.handle)) for x in tensors))
        return tuple(
            retyped(y, TensorHandle(narrow(y.handle.data), tl.bfloat16)) if is_bf16(x.handle) else y
            for x, y in zip(tensors, results, strict=False)  # of a value and its index there may be only one result
        )

    return apply


def _exact(create_dot: Callable) -> Callable:
    """Here a product of fp32 is exact whatever was asked for; on a GPU it is TF32 unless "ieee" was."""

    def dot(self, a, b, d, precision, *rest):
        if a.dtype.scalar == tl.float32 and precision.name != "IEEE":
            raise AssertionError("tl.dot of fp32 needs input_precision='ieee'")
        return create_dot(self, a, b, d, precision, *rest)

    return dot


def _once(patch_language: Callable) -> Callable:
    """Triton patches its language at every call of a device function, a third of all time. Once a launch will do."""
    scopes: dict[int, Any] = {}  # of the launch that runs, by the module that a function was written in

    def patch_new_modules(fn):
        if (module := id(fn.__globals__)) not in scopes:
            scopes[module] = scope = patch_language(fn)
            scope.restore = restore
        return scopes[module]

    def restore():
        while scopes:
            type(scope := scopes.popitem()[1]).restore(scope)

    return patch_new_modules


def install() -> None:
    """Make the interpreter's bfloat16 right, and all of it faster, from now on in this process."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    InterpreterBuilder.get_bf16 = lambda self, x: TensorHandle(narrow(np.array([x], np.float32)), tl.bfloat16)
    # tl.maximum and tl.minimum pass over NaN unless told otherwise, as the GPU's instructions and tl.max do.
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    for name in ["unary_op", "binary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_dot"]:
        setattr(InterpreterBuilder, name, _through_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _exact(InterpreterBuilder.create_dot)
    ReduceScanOpInterface.apply = _reduce(ReduceScanOpInterface.apply)
    interpreter._patch_lang = _once(interpreter._patch_lang)


# 2. The checker -----------------------------------------------------------------------------------------------------


class AccessError(AssertionError):
    """A kernel touched memory that it must not touch."""


NOBODY, SEVERAL = -1, -2  # who touched an element; else the number of the one program that did
MEETS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}


Argument = tuple[int, torch.Size, tuple[int, ...]]  # a tensor by its address, shape and strides


def argument(x: torch.Tensor) -> Argument:
    return x.data_ptr(), x.shape, x.stride()


class Pointer(tl.pointer_type):
    """The type of a pointer that remembers which argument of the launch it began as, however far it was moved."""

    def __init__(self, element_ty: tl.dtype, of: Argument) -> None:
        super().__init__(element_ty)
        self.of = of


class Memory:
    """A storage that tensors of a launch lie in: which of its elements are whose, and which program touched them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        first, *_ = tensors.values()
        self.start, size = first.untyped_storage().data_ptr(), first.untyped_storage().nbytes()
        self.unit = min(x.element_size() for x in tensors.values())  # all is counted in units of so many bytes
        self.units = size // self.unit

        def mark(x: torch.Tensor, sizes: Any, strides: Any) -> np.ndarray:
            marks = np.zeros(size // x.element_size(), bool)
            torch.from_numpy(marks).as_strided(sizes, strides, x.storage_offset()).fill_(True)
            return marks.repeat(x.element_size() // self.unit)[: self.units]

        elements = {argument(x): mark(x, x.shape, x.stride()) for x in tensors.values()}
        anyones = np.logical_or.reduce(list(elements.values()))
        self.of = {
            argument(x): elements[argument(x)] | mark(x, *_rows_to_their_ends(x)) & ~anyones for x in tensors.values()
        }
        self.touched = {kind: np.full(self.units, NOBODY, np.int32) for kind in MEETS}

    def touch(self, kind: str, at: np.ndarray, size: int, program: int, of: Argument) -> tuple[int, str, int] | None:
        """Note a program's access of `size` bytes at each address. What is wrong: where, and what who else did."""
        units = (at - np.uint64(self.start)).view(np.int64) // self.unit
        last = units + (max(size // self.unit, 1) - 1)
        own = self.of.get(of, np.zeros(self.units, bool))
        outside = (units < 0) | (last >= self.units) | ~own.take(units, mode="clip") | ~own.take(last, mode="clip")
        if outside.any():
            return int(at[outside][0]), "", NOBODY
        for other in MEETS[kind]:
            by = self.touched[other].take(units)
            race = (by != NOBODY) & (by != program)
            if race.any():
                return int(at[race][0]), other, int(by[race][0])
        by = self.touched[kind].take(units)
        self.touched[kind][units] = np.where((by == NOBODY) | (by == program), program, SEVERAL)
        return None


def _rows_to_their_ends(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of x, with the padding after each row unless the storage ends there."""
    sizes, strides = list(x.shape), list(x.stride())
    if x.ndim > 1 and strides[-1] == 1:
        row = min((s for s in strides[:-1] if s >= sizes[-1]), default=0)
        end = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        before = sum((n - 1) * s for n, s in zip(sizes[:-1], strides[:-1], strict=True))
        sizes[-1] = max(sizes[-1], min(row, end - before))
    return sizes, strides


class Launch:
    """The memory of one launch, and the names for it in errors."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        storages: dict[int, dict[str, torch.Tensor]] = {}
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.numel() > 0:
                storages.setdefault(x.untyped_storage().data_ptr(), {})[name] = x
        self.memories = [Memory(storages[start]) for start in sorted(storages)]
        self.starts = np.array([m.start for m in self.memories], np.uint64)

    def touch(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
        """Note an access by the program that runs."""
        at = pointers.data.ravel() if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        of = pointers.dtype.scalar.of
        program, grid = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
        owners = np.searchsorted(self.starts, at, side="right").clip(1) - 1  # the last storage that begins before
        for n in np.unique(owners):
            number = int(np.ravel_multi_index(program, grid))
            if wrong := self.memories[n].touch(kind, at[owners == n], size, number, of):
                address, other, by = wrong
                why = "is outside of its tensor"
                if other:
                    who = "several" if by == SEVERAL else tuple(map(int, np.unravel_index(by, grid)))
                    why = f"meets a {other} by program {who}"
                raise AccessError(f"{self.kernel}, program {program}: {kind} at {self._name(address, of)} {why}")

    def _name(self, address: int, of: Argument) -> str:
        """The address as an offset into the argument that its pointer began as."""
        tensors = {argument(x): (name, x) for m in self.memories for name, x in m.tensors.items()}
        name, x = tensors[of]
        offset = (address - x.data_ptr()) // x.element_size()
        return f"{name} + {offset} (shape {tuple(x.shape)}, strides {x.stride()})"


@contextlib.contextmanager
def checked() -> Iterator[list[str]]:
    """Watch all launches inside; gives the list of the kernels launched so far, and raises AccessError."""
    kernels: list[str] = []
    launch: Launch | None = None
    execute, builder, convert = GridExecutor.__call__, InterpreterBuilder, interpreter._implicit_cvt

    def named(x):
        y = convert(x)
        if isinstance(x, torch.Tensor):
            kind = Pointer(y.type.element_ty, argument(x))
            y = tl.tensor(TensorHandle(y.handle.data, kind), kind)
        return y

    def run(self, *args, **kwargs):
        nonlocal launch
        launch = Launch(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        kernels.append(launch.kernel)
        try:
            return execute(self, *args, **kwargs)
        except InterpreterError as e:  # the interpreter's own, which tells of the error but is not it
            raise e.__cause__ if isinstance(e.__cause__, AssertionError) else e from None

    def watched(kind: str, method: Callable, pointer: int, mask: int | None) -> Callable:
        def access(self, *args, **kwargs):
            launch.touch(kind, args[pointer], None if mask is None else args[mask])
            return method(self, *args, **kwargs)

        return access

    with (
        patch.object(GridExecutor, "__call__", run),
        patch.object(interpreter, "_implicit_cvt", named),
        patch.object(builder, "create_masked_load", watched("load", builder.create_masked_load, 0, 1)),
        patch.object(builder, "create_masked_store", watched("store", builder.create_masked_store, 0, 2)),
        patch.object(builder, "create_atomic_rmw", watched("atomic", builder.create_atomic_rmw, 1, 3)),
        patch.object(builder, "create_atomic_cas", watched("atomic", builder.create_atomic_cas, 0, None)),
    ):
        yield kernels
