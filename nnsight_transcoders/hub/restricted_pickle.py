"""Unpickling that runs no code: the classes a torch checkpoint names become inert records.

A pickle is a program. It can ask for any function of any module and call it, which is why
``pickle.load`` on a downloaded file hands the machine to whoever wrote it. Here the names it may
ask for are listed, and none of them gives the real thing: ``torch._utils._rebuild_tensor_v2``
gives a record of storage, offset, shape and strides, a storage gives a record of its key, and a
class of ``sae_training.config`` an object that only holds what it is given. Any other name is an
error that says which. The tensors are put together afterwards, with bounds checked, by
``torch_files``.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import IO, Any, NamedTuple

import torch

from nnsight_transcoders.errors import CheckpointError

#: Longest pickle that is read; the numbers of a checkpoint are not in it.
MAX_PICKLE = 1 << 22

_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
    DeprecationWarning,  # for a text's escapes, where warnings are errors
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")
_RECORDS = "sae_training.config"
#: Opcodes that reach classes in ways no checkpoint needs, or double what is on the stack.
_REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"}
_REFUSED |= {"DUP", "FROZENSET"}
#: Opcodes that put what was just made into a slot of the unpickler's memory, and take it out.
_NUMBERED = {"PUT", "BINPUT", "LONG_BINPUT"}
_PUTS = _NUMBERED | {"MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
#: After these, what lies on top was not just made; no pickler puts it away then.
_OLD = _PUTS | _GETS | {"POP", "POP_MARK"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
#: How often tuples may be used again. Tuples of tuples of one tuple are small in the file, but
#: using the outermost as a key takes as many steps as there are paths through them.
_MAX_TUPLES_AGAIN = 16


class Record:
    """Stands for an object of the writer's own class: holds its attributes, does nothing."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise pickle.UnpicklingError("a config record whose state is no mapping of names")
        self.__dict__.update(state)


class _Mapping(dict[Any, Any]):
    """Stands for ``OrderedDict``, without the attributes that a pickle could hide methods under."""

    __slots__ = ()

    def __setstate__(self, _state: object) -> None:
        """Ignore the attributes a state dict carries (``_metadata``)."""


# Named tuples: a pickle may set attributes of what it has made, and these have none to set.


class StorageRef(NamedTuple):
    """A piece of memory the pickle refers to: which one, of what type, how many numbers."""

    key: str
    dtype: torch.dtype
    numel: int


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: a view into a storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    """Stands for a class such as ``torch.FloatStorage``."""

    dtype: torch.dtype


class _Function:
    """Stands for one of the functions that may be called."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a function to {type(value).__name__}")

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)


def load_restricted(
    file: IO[bytes], where: str, stand_ins: Mapping[tuple[str, str], type] | None = None
) -> Any:
    """Read one pickle from where the file stands, and leave the file behind it.

    Args:
        file: A seekable file.
        where: What to call it in messages.
        stand_ins: (module, name) of further classes a file may have objects of -> what stands for
            them: a subclass of ``Record``, or a named tuple. Each file gets subclasses of its own.

    Raises:
        CheckpointError: It names something that is not allowed, is damaged, or too long.
    """
    data = _one_pickle(file, where)
    try:
        return _Unpickler(BytesIO(data), where, stand_ins or {}).load()
    except _ERRORS as error:
        raise CheckpointError(f"{where}: the pickle in it cannot be read ({error})") from error


def _one_pickle(file: IO[bytes], where: str) -> bytes:
    """The bytes of one pickle, whose instructions are looked at but not carried out.

    The unpickler makes room for a text or a memory slot as large as an instruction says, so an
    instruction must not say more than the file has.
    """
    start = file.tell()
    for limit in (1 << 16, MAX_PICKLE):  # the first is nearly always enough
        file.seek(start)
        head = file.read(limit)
        try:
            end = _scan(head, where)
        except _ERRORS as error:
            if len(head) < limit or limit == MAX_PICKLE:
                raise CheckpointError(
                    f"{where}: no complete pickle of at most {MAX_PICKLE} bytes in it ({error})"
                ) from error
        else:
            file.seek(start + end)
            return head[:end]
    raise AssertionError("unreachable")


def _scan(head: bytes, where: str) -> int:
    """Where the pickle at the start of some bytes ends."""
    stream = BytesIO(head)
    tuples: set[int] = set()
    slots, again, before = 0, 0, ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name in _REFUSED or (name in _PUTS and before in _OLD):
            raise CheckpointError(f"{where}: the pickle in it uses {name} here, which is refused")
        if name in _PUTS:
            slot = int(str(argument)) if name in _NUMBERED else slots
            if slot > count:
                raise CheckpointError(f"{where}: the pickle in it asks for slot {slot}: refused")
            (tuples.add if before in _TUPLES else tuples.discard)(slot)
            slots += 1
        elif name in _GETS:
            again += int(str(argument)) in tuples
        before = name
    if again > _MAX_TUPLES_AGAIN:
        raise CheckpointError(f"{where}: the pickle in it uses tuples {again} times: refused")
    return stream.tell()


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: IO[bytes], where: str, stand_ins: Mapping[tuple[str, str], type]
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._where, self._stand_ins = where, stand_ins

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in for a name; the unpickler asks here for every class and function."""
        if module_name == _RECORDS or module_name.startswith(f"{_RECORDS}."):
            return type(global_name, (Record,), {})
        if (module_name, global_name) in self._stand_ins:
            base = self._stand_ins[module_name, global_name]
            return type(global_name, (base,), {"__slots__": ()} if issubclass(base, tuple) else {})
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return type(global_name, (_Mapping,), {"__slots__": ()})
        if module_name == "torch" and global_name in _STORAGES:
            return _StorageType(_STORAGES[global_name])
        if module_name == "torch" and global_name in _DTYPES:
            return getattr(torch, global_name)
        if (module_name, global_name) in _FUNCTIONS:
            return _Function(_FUNCTIONS[module_name, global_name])
        raise CheckpointError(
            f"{self._where} asks for {module_name}.{global_name}, which reading weights does not "
            "need: it is refused, and nothing was run. Do not open this file with anything that "
            "unpickles it unless you trust its author"
        )

    def persistent_load(self, pid: Any) -> StorageRef:
        """``("storage", type, key, device, numel, ...)`` -> a reference; nothing is opened."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise CheckpointError(f"{self._where} refers to something that is no storage: refused")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or not _is_key(key) or not _is_count(numel):
            raise CheckpointError(
                f"{self._where} refers to a storage by the key {shown(key)}, which is none: refused"
            )
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError(f"{self._where} has a storage inside another one: not read")
        return StorageRef(key, kind.dtype, numel)


def shown(value: object) -> str:
    """A value out of a pickle for a message: texts cut, others by their type only.

    A list that holds one list twice, and so on, is short in the file and endless in print.
    """
    return repr(value[:80]) if isinstance(value, str) else f"<{type(value).__name__}>"


def _is_key(key: object) -> bool:
    return isinstance(key, str) and len(key) <= 32 and key.isascii() and key.isdecimal()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, *_rest: object
) -> TensorRecord:
    counts = (shape, strides)
    if not isinstance(storage, StorageRef) or not _is_count(offset):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(isinstance(c, tuple) and all(map(_is_count, c)) for c in counts):
        raise pickle.UnpicklingError("a tensor whose shape or strides are no numbers")
    return TensorRecord(storage, offset, shape, strides)  # type: ignore[arg-type]


def _rebuild_parameter(data: object, *_rest: object) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return data


def _device(*names: object) -> str:
    if not all(isinstance(name, str | int) for name in names):
        raise pickle.UnpicklingError("a device whose name is no text")
    return ":".join(map(str, names))


def _size(sizes: object = ()) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or not all(map(_is_count, sizes)):
        raise pickle.UnpicklingError("a size that is no list of numbers")
    return tuple(sizes)


_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "device"): _device,
    ("torch", "Size"): _size,
}
