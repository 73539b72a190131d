"""Read a pickle as plain data: nothing that it names is imported, looked up or called.

Python's own unpickler, even with a restricted `find_class`, still calls what it found, sets
attributes on it, consults the copyreg extension cache and hashes nested keys. Here each opcode
is interpreted by this module alone, and a name is only a key into a table of our functions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Constructor = Callable[[tuple[Any, ...]], Any]
PLAIN_KEYS = (str, int, float, bool, type(None))
# Names of Python 2, which protocols below 3 still write.
OLD_BUILTINS = "__builtin__"
OLD_NAMES = {"long": "int", "unicode": "str"}


class RefusedPickle(ValueError):
    """The pickle asks for something that is not in the list of inert names, or is damaged."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Inert:
    """Stands for an object of a class that we allow but do not need; its state is dropped."""

    kind: Name


def read_pickle(
    data: bytes,
    constructors: Mapping[Name, Constructor | None],
    persistent: Callable[[Any], Any],
) -> Any:
    """Interpret `data` (protocols 2 to 5) without running any code that it chooses.

    Args:
        data: the pickle.
        constructors: what each allowed global becomes when the pickle calls it: a function of
            the tuple of arguments; None where it may be mentioned but not called.
        persistent: turns a persistent id into a value, or raises.

    Returns:
        Dicts, lists, tuples, sets, strings, bytes, numbers, None, `Name`, `Inert`, and whatever
        `constructors` and `persistent` return. Attributes set on objects are dropped.

    Raises:
        RefusedPickle: another global, a call of something else, an opcode outside the plain
            subset (extension registry, INST, OBJ, text protocols), or damaged data.
    """
    machine = _Machine(constructors, persistent)
    try:
        return machine.run(data)
    except (IndexError, KeyError, TypeError) as error:
        raise RefusedPickle(f"the pickle is damaged: {error!r}") from error
    except RefusedPickle:
        raise
    except ValueError as error:
        raise RefusedPickle(f"the pickle is damaged or hostile: {error}") from error


class _Machine:
    """The pickle machine: a stack, marks on it and a memo, with plain values only."""

    def __init__(
        self,
        constructors: Mapping[Name, Constructor | None],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.constructors = constructors
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(data):
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise RefusedPickle(
                    f"opcode {opcode.name} at byte {position} of the pickle is refused: "
                    "checkpoints need only plain data and tensors"
                )
            handler(self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_tuple(self, size: int) -> None:
        if size > len(self.stack):
            raise RefusedPickle(f"a tuple of {size} on a stack of {len(self.stack)}")
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.push(items)

    def push_name(self, module: str, name: str) -> None:
        if module == OLD_BUILTINS:
            module, name = "builtins", OLD_NAMES.get(name, name)
        found = Name(module, name)
        if found not in self.constructors:
            raise RefusedPickle(
                f"the pickle names the global {str(found)!r}, which is not among the inert names "
                "that a checkpoint may hold; the file is refused and nothing of it was run"
            )
        self.push(found)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise RefusedPickle("STACK_GLOBAL expects two strings")
        self.push_name(module, name)

    def call(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, Name) or not isinstance(arguments, tuple):
            raise RefusedPickle(f"the pickle calls a {type(target).__name__}, not a listed name")
        constructor = self.constructors[target]
        if constructor is None:
            raise RefusedPickle(f"the pickle calls {str(target)!r}, which may only be mentioned")
        self.push(constructor(arguments))

    def drop_state(self) -> None:
        self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (Inert, dict)):
            raise RefusedPickle(f"the pickle sets attributes on a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedPickle(f"the pickle sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise RefusedPickle(f"the pickle adds items to a {type(target).__name__}")
        target.update(_plain_key(item) for item in items)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise RefusedPickle(f"the pickle appends to a {type(target).__name__}")
        target.extend(items)

    def pop_pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]


def _plain_key(key: Any) -> Any:
    # Hashing nested tuples takes exponential time and unbounded recursion.
    if type(key) not in PLAIN_KEYS:
        raise RefusedPickle(f"a key of type {type(key).__name__}; expected a string or a number")
    return key


_Handler = Callable[[_Machine, Any], object]


def _nothing(machine: _Machine, argument: Any) -> None:
    """PROTO, FRAME and STOP hold no data."""


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


_LITERALS = (
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8"
)
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(_LITERALS.split(), _push_argument),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop_pair()),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.add_items(m.pop_to_mark()),
    "GLOBAL": lambda m, argument: m.push_name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "BUILD": lambda m, _: m.drop_state(),
    "BINPERSID": lambda m, _: m.push(m.persistent(m.stack.pop())),
}
