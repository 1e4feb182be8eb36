"""Kernels under Triton's interpreter, every access to memory watched: is it legal, is there a race, what is moved?

    with checked() as launches:
        run("cuda", "read", table_SV, slots_TK, weights_TK)
    print(launches[0].arguments["table"].loaded)

A GPU would not say that a kernel reads beside its tensors, and shows a race now and then. Here each argument's pointer
carries the argument's number in bits that no address needs, so it is known whose elements an access is meant for
even far off (below 2^48 bytes), and each byte remembers which program wrote and which one read it. Needs a process
that was started with TRITON_INTERPRET=1.

Not found: a program that stores where it loaded before, or twice to one place; integer atomics whose result depends on
their order; arguments that share memory without sharing a storage.
"""

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

_ADDRESS_BITS = 48
_ADDRESS = np.uint64(2**_ADDRESS_BITS - 1)
_NOBODY, _SEVERAL = -1, -2  # beside the numbers of programs


class UnsafeKernelError(AssertionError):
    """What a kernel must not do: where, and to which argument."""


@dataclass
class Moved:
    """Bytes of an argument; those of one load or store count once, however many of its lanes ask for them."""

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0


@dataclass
class CheckedLaunch:
    """What one launch moved, by argument."""

    name: str
    grid: tuple[int, ...]
    settings: dict[str, Any]
    arguments: dict[str, Moved] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """Bytes, of all arguments."""
        return sum(moved.loaded for moved in self.arguments.values())

    @property
    def stored(self) -> int:
        """Bytes, of all arguments."""
        return sum(moved.stored for moved in self.arguments.values())


@contextmanager
def checked(*, may_race: Collection[str] = ()) -> Iterator[list[CheckedLaunch]]:
    """Launches within are checked, and listed with what they moved; `UnsafeKernelError` is raised at the first fault.

    Faults are: an access beside the elements of the argument whose pointer it began with; two programs of a launch of
    which one writes what the other reads or writes; a program that reads what it has written, or lanes of one store
    that write different values to one place, since threads are not in step; a float atomic, whose order is not fixed.

    may_race: names of kernels that may do all but the first.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("only what is interpreted can be checked: start the process with TRITON_INTERPRET=1")
    launches: list[CheckedLaunch] = []
    run, convert, builder = InterpretedFunction.run, interpreter._implicit_cvt, interpreter.interpreter_builder

    def checked_run(kernel, *arguments, grid, warmup=False, **settings):
        watch = _Watch(kernel, arguments, grid, settings, builder, kernel.__name__ in may_race)
        hooks = _hooks(watch, builder)
        interpreter._implicit_cvt = watch.converting(convert)
        try:
            for name, hook in hooks.items():
                setattr(builder, name, hook)
            run(kernel, *arguments, grid=grid, warmup=warmup, **settings)
        except interpreter.InterpreterError as error:
            raise _unsafe(error) or error from None
        finally:
            interpreter._implicit_cvt = convert
            for name in hooks:
                delattr(builder, name)
        launches.append(watch.launch())

    InterpretedFunction.run = checked_run
    try:
        yield launches
    finally:
        InterpretedFunction.run = run


def _unsafe(error: BaseException | None) -> UnsafeKernelError | None:
    """What an error of the interpreter, or of a function that a kernel calls, was raised for."""
    while error is not None and not isinstance(error, UnsafeKernelError):
        error = error.__cause__
    return error


def _hooks(watch: "_Watch", builder: Any) -> dict[str, Any]:
    """The builder's operations on memory, with the watch before each."""
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def checked_load(pointers, mask, *rest):
        watch.loads(pointers, mask.data)
        return load(_untagged(pointers), mask, *rest)

    def checked_store(pointers, values, mask, *rest):
        watch.stores(pointers, mask.data, values.data)
        return store(_untagged(pointers), values, mask, *rest)

    def checked_update(operation, pointers, values, mask, *rest):
        watch.updates(pointers, mask.data, values)
        return update(operation, _untagged(pointers), values, mask, *rest)

    def checked_exchange(pointers, expected, values, *rest):
        watch.updates(pointers, np.ones_like(pointers.data, dtype=bool), values)
        return exchange(_untagged(pointers), expected, values, *rest)

    return {
        "create_masked_load": checked_load,
        "create_masked_store": checked_store,
        "create_atomic_rmw": checked_update,
        "create_atomic_cas": checked_exchange,
    }


def _untagged(pointers: TensorHandle) -> TensorHandle:
    return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)


def _chosen(pointers: TensorHandle, mask: np.ndarray) -> np.ndarray:
    return np.broadcast_to(mask, pointers.data.shape).astype(bool)  # a mask may be made of integers


class _Argument:
    """A tensor, byte by byte from its first element to its last."""

    def __init__(self, name: str, tensor: Tensor):
        self.name, self.tensor = name, tensor
        size, self.start = tensor.element_size(), tensor.data_ptr()
        spans = [(length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        elements = sum(spans) + 1 if tensor.numel() else 0
        owned = torch.zeros(elements, dtype=torch.bool)
        owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.owned = np.repeat(owned.numpy(), size)
        self.loaded, self.stored = np.zeros((2, elements * size), dtype=bool)
        self.moved = Moved()

    def total(self) -> Moved:
        self.moved.distinct_loaded, self.moved.distinct_stored = int(self.loaded.sum()), int(self.stored.sum())
        return self.moved

    def describe(self) -> str:
        return f"`{self.name}` of shape {[*self.tensor.shape]} and strides {[*self.tensor.stride()]}"


class _Memory:
    """Of the bytes of one storage: which program reads, writes, updates each."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.start = storage.data_ptr()
        self.reader, self.writer, self.updater = np.full((3, storage.nbytes()), _NOBODY, dtype=np.int64)


class _Watch:
    """One launch."""

    def __init__(self, kernel, arguments, grid, settings, builder, may_race: bool):
        self.kernel, self.grid, self.settings, self.builder = kernel, tuple(grid), settings, builder
        self.may_race = may_race
        self.file = inspect.getsourcefile(kernel.fn)
        known = {name: value for name, value in settings.items() if name in kernel.arg_names}
        bound = inspect.getcallargs(kernel.fn, *arguments, **known)
        # In the order in which the interpreter converts them.
        self.names = [name for name, value in bound.items() if isinstance(value, Tensor)]
        self.arguments: list[_Argument] = []
        self.memories: dict[int, _Memory] = {}

    def launch(self) -> CheckedLaunch:
        arguments = {argument.name: argument.total() for argument in self.arguments}
        return CheckedLaunch(self.kernel.__name__, self.grid, self.settings, arguments)

    def converting(self, convert):
        """The interpreter's conversion of arguments, which numbers the pointers of tensors."""

        def tag(value):
            converted = convert(value)
            if isinstance(value, Tensor):
                argument = _Argument(self.names[len(self.arguments)], value)
                self.arguments.append(argument)
                number = np.uint64(len(self.arguments) << _ADDRESS_BITS)
                converted.handle.data = converted.handle.data | number
                memory = _Memory(value)
                self.memories.setdefault(memory.start, memory)
            return converted

        return tag

    def loads(self, pointers: TensorHandle, mask: np.ndarray) -> None:
        for argument, memory, at, place in self._accesses(pointers, mask, "loads"):
            argument.loaded[at] = True
            argument.moved.loaded += at.size
            program = self._program()
            self._check(memory.writer[place], argument, at, "loads", "stored", also_own=True)
            self._check(memory.updater[place], argument, at, "loads", "updated")
            readers = memory.reader[place]
            memory.reader[place] = np.where((readers == _NOBODY) | (readers == program), program, _SEVERAL)

    def stores(self, pointers: TensorHandle, mask: np.ndarray, values: np.ndarray) -> None:
        self._check_lanes(pointers, mask, values)
        for argument, memory, at, place in self._accesses(pointers, mask, "stores"):
            argument.stored[at] = True
            argument.moved.stored += at.size
            for who, did in ((memory.writer, "stored"), (memory.reader, "loaded"), (memory.updater, "updated")):
                self._check(who[place], argument, at, "stores", did)
            memory.writer[place] = self._program()

    def updates(self, pointers: TensorHandle, mask: np.ndarray, values: TensorHandle) -> None:
        if values.dtype.scalar.is_floating() and not self.may_race:
            raise self._error("updates floats by an atomic operation, so that sums depend on the order of programs")
        for argument, memory, at, place in self._accesses(pointers, mask, "updates"):
            argument.loaded[at] = argument.stored[at] = True
            argument.moved.loaded += at.size
            argument.moved.stored += at.size
            for who, did in ((memory.writer, "stored"), (memory.reader, "loaded")):
                self._check(who[place], argument, at, "updates", did)
            updaters, program = memory.updater[place], self._program()
            memory.updater[place] = np.where((updaters == _NOBODY) | (updaters == program), program, _SEVERAL)

    def _accesses(self, pointers: TensorHandle, mask: np.ndarray, what: str):
        """(argument, its memory, bytes counted from its first one, the same from its storage's) of what is legal."""
        addresses = np.unique(pointers.data[_chosen(pointers, mask)])
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        numbers = (addresses >> np.uint64(_ADDRESS_BITS)).astype(np.int64)
        for number in np.unique(numbers):
            if not 1 <= number <= len(self.arguments):
                raise self._error(f"{what} by a pointer of none of its arguments")
            argument = self.arguments[number - 1]
            first = (addresses[numbers == number] & _ADDRESS).astype(np.int64) - argument.start
            is_beside = (first < 0) | (first + size > argument.owned.size)
            inside = first[~is_beside]
            is_beside[~is_beside] = ~(argument.owned[inside] & argument.owned[inside + size - 1])
            if is_beside.any():
                places = first[is_beside] // argument.tensor.element_size()
                ends = f"{places.min()}" + (f" to {places.max()}" if len(places) > 1 else "")
                raise self._error(f"{what} {len(places)} times beside {argument.describe()}: at element {ends}")
            at = (first[:, None] + np.arange(size)).ravel()
            memory = self.memories[argument.tensor.untyped_storage().data_ptr()]
            yield argument, memory, at, at + (argument.start - memory.start)

    def _check(self, who: np.ndarray, argument: _Argument, at: np.ndarray, does: str, did: str, also_own=False) -> None:
        """Raises where another program did something that does not go with what this one does."""
        if self.may_race:
            return
        is_race = (who != _NOBODY) & ((who != self._program()) | also_own)
        if is_race.any():
            first = int(np.argmax(is_race))
            other = "others have" if who[first] == _SEVERAL else f"program {self._place(int(who[first]))} has"
            element = int(at[first]) // argument.tensor.element_size()
            raise self._error(f"{does} what {other} {did}: element {element} of {argument.describe()}")

    def _check_lanes(self, pointers: TensorHandle, mask: np.ndarray, values: np.ndarray) -> None:
        if self.may_race:
            return
        chosen = _chosen(pointers, mask)
        addresses = pointers.data[chosen]
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if len(first) == len(addresses):
            return
        stored = np.broadcast_to(values, pointers.data.shape)[chosen]
        stored = np.ascontiguousarray(stored).view(f"u{stored.itemsize}")  # bit for bit, so that NaN equals itself
        if (stored != stored[first][inverse.ravel()]).any():
            raise self._error("stores different values to one place in one store")

    def _program(self) -> int:
        x, y, z = self.builder.grid_idx
        _, size_y, size_z = self.builder.grid_dim
        return (x * size_y + y) * size_z + z

    def _place(self, program: int) -> tuple[int, ...]:
        _, size_y, size_z = self.builder.grid_dim
        return (program // (size_y * size_z), program // size_z % size_y, program % size_z)[: max(1, len(self.grid))]

    def _error(self, what: str) -> UnsafeKernelError:
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        line = f", line {frame.f_lineno}" if frame.f_code.co_filename == self.file else ""
        return UnsafeKernelError(f"{self.kernel.__name__}{line}: program {self._place(self._program())} {what}")
