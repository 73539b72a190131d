"""The proxy breaks requests as told, and a folder on S3 gets over it."""

import time
from functools import partial

import fsspec
import pytest
from fault_proxy import SPELLS, Fault, FaultPlan, running_proxy

from storage.errors import StoreRefused, StoreUnavailable
from storage.folders import open_folder

DATA = bytes(range(256)) * 100
PART = 5 * 2**20  # bytes of a part, the fewest that S3 takes
OTHERS = (*SPELLS, Fault.STALE_LISTING, Fault.FORGOTTEN)  # have tests of their own


@pytest.fixture
def proxy(seaweed, monkeypatch):
    """A proxy that breaks nothing yet, with this process's S3 led through it."""
    with running_proxy(seaweed, None) as running:
        impatient = {**running.settings, "config_kwargs": {"read_timeout": 1.0}}
        monkeypatch.setitem(fsspec.config.conf, "s3", impatient)
        yield running


@pytest.fixture
def folder(proxy, seaweed, tmp_path):
    """A folder on S3 with one object in it."""
    opened = open_folder(f"{seaweed.url}/{tmp_path.name}")
    opened.write("old", b"1")
    return opened


@pytest.mark.parametrize("fault", [f for f in Fault if f not in OTHERS])
def test_broken_requests_are_made_again_with_the_right_result(proxy, folder, fault):
    folder.write("there", DATA)
    proxy.plan = FaultPlan(seed=1, rate=1.0, weights={fault: 1.0}, limit=2, silence_s=1.5)
    folder.write("written", DATA)
    folder.write_new("created", DATA)  # nobody else was first, whatever the second attempt meets
    assert folder.read("there") == DATA
    folder.delete("old")
    assert proxy.faults == {fault: 2}
    time.sleep(0.5 if fault is Fault.LATE else 0)
    names = ("created", "there", "written")
    assert folder.read_many(["old", *names]) == dict.fromkeys(names, DATA)
    assert folder.sizes() == dict.fromkeys(names, len(DATA))


def test_older_listing_is_replayed_once(proxy, folder):
    listed = [folder.sizes()]
    folder.write("new", DATA)
    listed.append(folder.sizes())
    proxy.plan = FaultPlan(seed=1, rate=1.0, weights={Fault.STALE_LISTING: 1.0}, limit=1)
    assert folder.sizes() == listed[0] == {"old": 1}
    assert folder.sizes() == listed[1] == {"new": len(DATA), "old": 1}


@pytest.mark.parametrize(
    ("fault", "advice"), [(Fault.FULL, "make room"), (Fault.EXPIRED, "renew them")]
)
def test_spell_refuses_writes_until_it_is_over(proxy, folder, fault, advice):
    proxy.plan = FaultPlan(seed=1, rate=1.0, weights={fault: 1.0}, limit=1, spell_s=60)
    with pytest.raises(StoreUnavailable, match=advice) as refused:
        folder.write("new", DATA)
    assert not isinstance(refused.value, StoreRefused)  # another attempt may do
    assert folder.read("new") is None
    folder.write("new", DATA)
    assert folder.read("new") == DATA


def test_large_objects_pass(proxy, folder):
    folder.write("large", DATA * 500)
    assert folder.read("large") == DATA * 500


def test_multipart_upload_that_the_server_forgot_is_made_again(
    proxy, folder, monkeypatch, tmp_path
):
    for name in ("pipe_file", "put_file"):  # objects of two parts and more go in parts
        put = partial(getattr(folder.filesystem, name), chunksize=PART)
        monkeypatch.setattr(folder.filesystem, name, put)
    data = DATA * (2 * PART // len(DATA) + 1)
    (tmp_path / "mesh").write_bytes(data)
    writes = {
        "written": lambda name: folder.write(name, data),
        "created": lambda name: folder.write_new(name, data),  # nobody else was first
        "uploaded": lambda name: folder.upload(name, tmp_path / "mesh"),
    }
    for count, (name, write) in enumerate(writes.items(), start=1):
        proxy.plan = FaultPlan(seed=1, rate=1.0, weights={Fault.FORGOTTEN: 1.0}, limit=count)
        write(name)
        assert proxy.faults == {Fault.FORGOTTEN: count}
        assert folder.read(name) == data


def test_empty_objects_can_be_read(proxy, folder):
    folder.write("empty", b"")
    assert folder.read("empty") == b""
    assert folder.read_many(["empty", "none"]) == {"empty": b""}
