"""What the pickle reader accepts, and that nothing in a pickle runs."""

import collections
import copyreg
import os
import pickle
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt3r.pickle_data import Inert, Name, RefusedPickle, read_pickle

ORDERED_DICT = Name("collections", "OrderedDict")
ALLOWED = {ORDERED_DICT: lambda arguments: {}, Name("typing", "Any"): None}

KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none())
PLAIN = st.recursive(
    st.one_of(KEYS, st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(KEYS, inner), st.lists(inner).map(tuple)
    ),
    max_leaves=30,
)


def read(data: bytes):
    return read_pickle(data, ALLOWED, persistent=lambda _: pytest.fail("no persistent id here"))


def binunicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call(module: str, name: str, argument: str) -> bytes:
    """A protocol 2 pickle that calls module.name(argument)."""
    named = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    return b"\x80\x02" + named + binunicode(argument) + b"\x85R."


class Payload:
    """Pickles as a call of `target`."""

    def __init__(self, target, *arguments):
        self.target, self.arguments = target, arguments

    def __reduce__(self):
        return self.target, self.arguments


@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4, 5]))
def test_read_pickle_equals_the_standard_reader_on_plain_data(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


def test_read_pickle_reads_sets_and_bytes():
    value = [{1, "a", None}, b"", b"x" * 300]
    assert read(pickle.dumps(value, 4)) == value


def test_read_pickle_keeps_a_value_that_is_used_twice_as_one():
    shared = [1]
    first, second = read(pickle.dumps((shared, shared), 2))
    assert first is second


def test_read_pickle_drops_attributes_of_an_ordered_dict():
    tensors = collections.OrderedDict(a=1)
    tensors._metadata = {"version": 1}  # as Module.state_dict does
    assert read(pickle.dumps(tensors, 2)) == {"a": 1}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("subprocess", "Popen"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("collections", "OrderedDict.__class__"),
        ("collections.abc", "OrderedDict"),
        ("collections OrderedDict", ""),
        ("omegaconf.os", "system"),
        ("typing.Any", "__class__"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_read_pickle_names_the_global_that_it_refuses(tmp_path, module, name, protocol):
    canary = tmp_path / "ran"
    data = call(module, name, f"touch {canary}")
    if protocol == 4:
        names = binunicode(module) + binunicode(name) + b"\x93"
        data = b"\x80\x04" + names + binunicode(f"touch {canary}") + b"\x85R."
    with pytest.raises(RefusedPickle, match="names the global"):
        read(data)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_read_pickle_runs_no_reduce_in_any_protocol(tmp_path, protocol):
    canary = tmp_path / "ran"
    for target, argument in ((os.system, f"touch {canary}"), (eval, f"open({str(canary)!r}, 'w')")):
        with pytest.raises(RefusedPickle):
            read(pickle.dumps({"model": Payload(target, argument)}, protocol))
    assert not canary.exists()


def test_read_pickle_refuses_a_getattr_chain_over_an_allowed_name():
    # getattr(OrderedDict, "__init__").__globals__... starts with builtins.getattr.
    with pytest.raises(RefusedPickle, match=r"builtins\.getattr"):
        read(pickle.dumps(Payload(getattr, collections.OrderedDict, "fromkeys"), 4))


def test_read_pickle_refuses_the_extension_registry_even_when_it_is_cached(tmp_path):
    canary = tmp_path / "ran"
    copyreg.add_extension("posix", "system", 77)
    try:
        data = b"\x80\x02\x82\x4d" + binunicode(f"touch {canary}") + b"\x85R."
        assert b"\x82\x4d" in pickle.dumps(os.system, 2)  # EXT1 77 is os.system to Python
        with pytest.raises(RefusedPickle, match="EXT1"):
            read(data)
        for opcode in (b"\x83\x4d\x00", b"\x84\x4d\x00\x00\x00"):
            with pytest.raises(RefusedPickle, match="EXT"):
                read(b"\x80\x02" + opcode + b"]\x85R.")
    finally:
        copyreg.remove_extension("posix", "system", 77)
    assert not canary.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(ctyping\nAny\no.",  # OBJ
        b"(X\x01\x00\x00\x00aiposix\nsystem\n.",  # INST
        b"P0\n.",  # PERSID
        b"\x80\x05\x97.",  # NEXT_BUFFER
    ],
)
def test_read_pickle_refuses_opcodes_outside_the_plain_subset(data):
    with pytest.raises(RefusedPickle, match="opcode"):
        read(data)


def test_read_pickle_refuses_to_call_what_may_only_be_mentioned():
    with pytest.raises(RefusedPickle, match="only be mentioned"):
        read(call("typing", "Any", "x"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\x01\x00\x00\x00a)R.",  # calls a string
        b"\x80\x02]N)R.",  # calls None
        b"\x80\x02ctyping\nAny\n}b.",  # sets attributes on a name
        b"\x80\x02]}b.",  # sets attributes on a list
        b"\x80\x02](K\x01K\x02u.",  # sets items of a list
        b"\x80\x02}K\x01a.",  # appends to a dict
    ],
)
def test_read_pickle_refuses_operations_on_the_wrong_kind_of_value(data):
    with pytest.raises(RefusedPickle):
        read(data)


def test_read_pickle_refuses_tuples_as_keys():
    # Hashing 2^60 nested tuples would never end.
    nested = b"K\x01" + b"q\x00h\x00\x86" * 60
    with pytest.raises(RefusedPickle, match="key of type tuple"):
        read(b"\x80\x02}" + nested + b"Ns.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02h\x05.",  # gets what was never put
        b"\x80\x02\x86.",  # a tuple of two from an empty stack
        b"\x80\x02t.",  # no mark
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a string of 2 GB in a file of 9 bytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",  # bytes of 2^63
        b"<!DOCTYPE html>",
        pickle.dumps({"a": [1, 2, 3]}, 2)[:-4],
    ],
)
def test_read_pickle_calls_damaged_data_damaged(data):
    with pytest.raises(RefusedPickle):
        read(data)


def test_read_pickle_memo_index_allocates_nothing():
    assert read(b"\x80\x02Nr\xff\xff\xff\xff.") is None  # LONG_BINPUT 2^32 - 1


def test_read_pickle_hands_constructors_arguments_and_drops_the_state(tmp_path: Path):
    seen = []

    def stub(arguments):
        seen.append(arguments)
        return Inert(Name("omegaconf.nodes", "AnyNode"))

    named = b"comegaconf.nodes\nAnyNode\n"
    state = b"}" + binunicode("__class__") + b"Ns"
    data = b"\x80\x02" + named + b")\x81" + state + b"b."
    value = read_pickle(data, {Name("omegaconf.nodes", "AnyNode"): stub}, lambda _: None)
    assert value == Inert(Name("omegaconf.nodes", "AnyNode"))
    assert seen == [()]
