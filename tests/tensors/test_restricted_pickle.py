"""Pickles: what they name is looked up in a table, and nothing else happens."""

import collections
import os
import pickle
import time

import pytest
import torch
from peak_memory import forget_peak, peak

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.restricted_pickle import (
    Record,
    RefusedGlobalError,
    StandIn,
    TruncatedPickleError,
    unpickle,
)
from dlrm_deploy.tensors.torch_file import TorchFile

PLAIN = {
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**31, -(2**63), 2**80, 0.5, float("inf")],
    "text": ["", "a", "ü" * 300],
    "bytes": [b"", b"\0\xff" * 200],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "rest": {None: True, (1, "x"): False, 3: {}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol_come_back(protocol):
    value = PLAIN if protocol > 2 else {**PLAIN, "bytes": []}  # protocol 2 writes bytes as a call
    data = pickle.dumps(value, protocol)
    assert unpickle(b"junk" + data + b"more", {}, "x", start=4) == (value, 4 + len(data))


def test_shared_values_stay_shared():
    part = [1]
    first, second = unpickle(pickle.dumps([part, part]), {}, "x")[0]
    assert first is second


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    def __init__(self, target):
        self.target = target

    def __setstate__(self, state):
        state["target"].touch()


ATTACKS = {
    "system": lambda target: Call(os.system, f"touch {target}"),
    "eval": lambda target: Call(eval, f"open({str(target)!r}, 'w')"),
    "open": lambda target: Call(open, str(target), "w"),
    "torch.load": lambda target: Call(torch.load, str(target)),
    "getattr": lambda target: Call(getattr, "", "join"),
    "setstate": State,
    "import": lambda target: Call(__import__, "os"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_pickle_names_is_called(tmp_path, attack, protocol):
    target = tmp_path / "owned"
    payload = {"state_dict": collections.OrderedDict(a=ATTACKS[attack](target))}
    for zipped in (True, False):
        path = tmp_path / "x.pt"
        torch.save(payload, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RefusedGlobalError, match=r"cannot read .*x.pt: it names .*; it was not called"):
            TorchFile(path)
    assert not target.exists()
    if attack in ("system", "eval", "open"):
        pickle.loads(pickle.dumps(payload, protocol))  # it works where pickles are trusted
        assert target.exists()


def raw(text):
    return b"\x80\x02" + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (raw(b"cposix\nsystem\nX\x02\0\0\0id\x85R."), "it names posix.system"),
        (raw(b"X\x05\0\0\0posixX\x06\0\0\0system\x93."), "it names posix.system"),
        (raw(b"(iposix\nsystem\n."), "it names posix.system"),
        (raw(b"cbuiltins\ngetattr\n."), "it names builtins.getattr"),
        (raw(b"ctorch\n_utils.__builtins__\n."), r"it names torch._utils.__builtins__"),
        (raw(b"(X\x01\0\0\0aos\x06\n."), "opcode 0x6f"),
        (raw(b"\x82\x01."), "opcode 0x82"),  # the extension registry
        (raw(b"\x97."), "opcode 0x97"),  # an out-of-band buffer
        (raw(b"I1\n."), "opcode 0x49"),
        (raw(b"X\x01\0\0\0a)R."), "it calls a str"),
        (raw(b"}X\x01\0\0\0a\x85R."), "it calls a dict"),
        (raw(b"cplain\nvalue\n)R."), "it calls a StandIn that is not to be called"),
        (raw(b"cplain\nmake\nK\x01R."), "it calls a StandIn"),  # arguments that are no tuple
        (raw(b"cplain\nmake\nK\x01K\x02\x86R."), "argument"),
        (raw(b"cplain\nmake\n}b."), "it sets the state of a StandIn"),
        (raw(b"]}b."), "it sets the state of a list"),
        (raw(b"\x8c\x01a}b."), "it sets the state of a str"),
        (raw(b"cplain\nmake\n)}K\x01K\x02s\x92."), "keyword arguments"),
        (raw(b"K\x01Q."), "refers to an object outside"),
        (raw(b"h\x07."), "takes object 7, which was not stored"),
        (raw(b"q\x00."), "an empty stack"),
        (raw(b"."), "an empty stack"),
        (raw(b"(."), "an empty stack"),
        (raw(b"(\x85."), "an empty stack"),
        (raw(b"00."), "an empty stack"),
        (raw(b"t."), "no mark"),
        (raw(b"}K\x01a."), "it appends to a dict"),
        (raw(b"]K\x01K\x02s."), "items of a list"),
        (raw(b"}(K\x01u."), "1 halves of items"),
        (raw(b"}]K\x01s."), "a list cannot be a key"),
        (raw(b"X\x01\0\0\0\xff."), "can't decode"),
        (raw(b"\x8b\xff\xff\0\0" + b"\xff" * 70000 + b"."), "an integer of 65535 bytes"),
        (raw(b"K\x01K\x02\x93."), "a name is no string"),
        (raw(b"c" + b"x" * 2000), "longer than 1000"),
    ],
)
def test_misuse_of_the_machine_is_refused(data, message):
    stand_ins = {("plain", "make"): StandIn(lambda: []), ("plain", "value"): StandIn(value=1)}
    with pytest.raises(CheckpointError, match=message):
        unpickle(data, stand_ins, "x")


def test_state_reaches_a_record_only():
    record, _ = unpickle(
        raw(b"cplain\nrecord\n)\x81}X\x01\0\0\0aK\x05sb."), {("plain", "record"): StandIn(Record)}, "x"
    )
    assert record.get("a", int) == 5
    with pytest.raises(ValueError, match="a is int, expected str"):
        record.get("a", str)


def test_every_prefix_is_said_to_be_cut_off():
    data = pickle.dumps(PLAIN)
    for length in range(len(data)):
        with pytest.raises(TruncatedPickleError, match=f"x: its pickle is cut off at byte {length}"):
            unpickle(data[:length], {}, "x")


@pytest.mark.parametrize(
    "data",
    [
        raw(b"Nr\xff\xff\xff\xff."),  # place 4294967295 of the memo
        raw(b"\x8e" + b"\xff" * 7 + b"\x7f"),  # bytes
        raw(b"\x8d" + b"\xff" * 8),  # text
        raw(b"\x95" + b"\xff" * 8 + b"N."),  # a frame
        raw(b")" + b"\x85" * 300_000 + b"."),  # tuples in tuples
        raw(b"}" + b")" + b"\x85" * 300_000 + b"K\x01s."),  # the same as a key, which Python would hash by recursion
        raw(b"]" * 300_000 + b"a" * 299_999 + b"."),
        raw(b"(" * 300_000 + b"N."),
    ],
    ids=["memo", "bytes", "text", "frame", "tuples", "key", "lists", "marks"],
)
def test_short_pickles_take_little_memory_and_time(data):
    forget_peak()
    before = peak()
    start = time.perf_counter()
    try:
        unpickle(data, {}, "x")
    except CheckpointError as err:
        assert len(str(err)) < 200  # noqa: PT017  some of them are read
    assert time.perf_counter() - start < 5
    assert peak() - before < 200_000_000


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (lambda: torch.nn.Linear(2, 2), "It holds a whole object, not only tensors: save its state_dict"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "neither quantized nor"),
        (lambda: Call(torch.distributed.init_process_group), "save with torch.distributed.checkpoint"),
        (lambda: Call(sorted), "load it in the program that wrote it"),
    ],
    ids=["module", "quantized", "sharded", "other"],
)
def test_harmless_things_are_refused_with_a_way_on(tmp_path, value, advice):
    torch.save({"x": value()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=advice):
        TorchFile(tmp_path / "x.pt")


def test_a_pickle_that_torch_did_not_write_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="it is a pickle, but not one of torch.save"):
        TorchFile(path)
    path.write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="it is a pickle, but not one of torch.save"):
        TorchFile(path)
