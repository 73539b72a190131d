"""Weights from a real server on loopback into the cache: checked, imported, listed, loaded."""

import hashlib
import http.server
import threading
from collections.abc import Iterator

import pytest
import torch

from ttt3r.config import TINY, ModelConfig
from ttt3r.fetch import plain_url
from ttt3r.known_weights import KNOWN_WEIGHTS, KnownWeights
from ttt3r.model import Model
from ttt3r.weights import (
    DownloadFailed,
    HashMismatch,
    Retry,
    WeightsInfo,
    WeightsMissing,
    fetch,
    list_weights,
    load_model,
    save_weights,
    weights_info,
)

QUICK = Retry(attempts=2, first_wait_s=0.01, timeout_s=5)
# The smallest widths that divide into the released numbers of heads.
NARROW = ModelConfig(
    enc_embed_dim=64,
    enc_depth=1,
    dec_embed_dim=192,
    dec_depth=4,
    state_size=6,
    local_mem_size=4,
    head_type="linear",
    image_size=224,
    mlp_ratio=1.0,
    ray_map_encoder=False,
)


class Site:
    """Files by name, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.port = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def answer(self, send_body: bool) -> None:
        body = self.site.files.get(self.path[1:])
        if send_body:
            self.site.asked.append(self.path[1:])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if send_body:
            self.wfile.write(body or b"")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    handler = type("SiteHandler", (Handler,), {"site": site})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> bytes:
    """A small checkpoint in the released format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("released") / "narrow.pth"
    torch.save({"args": None, "model": Model(NARROW).state_dict(), "epoch": 1}, path)
    return path.read_bytes()


@pytest.fixture
def ours(tmp_path) -> bytes:
    """A small file of save_weights."""
    torch.manual_seed(0)
    info = WeightsInfo("tiny", TINY, "", "CC0", "test", 20, True)
    save_weights(tmp_path / "ours.safetensors", Model(TINY), info)
    return (tmp_path / "ours.safetensors").read_bytes()


def publish(monkeypatch, mirrors, body: bytes, sha256: str | None = None) -> str:
    """Add a checkpoint to the catalogue."""
    known = KnownWeights(
        name="small",
        mirrors=tuple(mirrors),
        sha256=sha256 or hashlib.sha256(body).hexdigest(),
        size_bytes=len(body),
        licence="CC BY-NC-SA 4.0",
        segment_frames=60,
        notes="for tests",
    )
    monkeypatch.setitem(KNOWN_WEIGHTS, known.name, known)
    return known.name


def test_fetch_imports_a_known_checkpoint_which_then_loads_by_name(
    site, tmp_path, monkeypatch, released
):
    site.files["small.pth"] = released
    name = publish(monkeypatch, [site.url("small.pth")], released)
    with pytest.raises(WeightsMissing, match="ttt3r weights fetch small"):
        load_model(name, cache_dir=tmp_path)
    path = fetch(name, cache_dir=tmp_path, retry=QUICK)
    model, info = load_model(name, cache_dir=tmp_path)
    assert path == tmp_path / "weights" / "small.safetensors"
    assert model.config == info.config == NARROW
    assert (info.name, info.licence, info.notes) == ("small", "CC BY-NC-SA 4.0", "for tests")
    assert info.segment_frames == 60
    assert info.source == site.url("small.pth")
    assert info.identity == "matches the publicly reported small file"
    assert list((tmp_path / "downloads").iterdir()) == []


def test_fetch_does_not_download_twice(site, tmp_path, monkeypatch, released):
    site.files["small.pth"] = released
    name = publish(monkeypatch, [site.url("small.pth")], released)
    first = fetch(name, cache_dir=tmp_path, retry=QUICK)
    assert fetch(name, cache_dir=tmp_path, retry=QUICK) == first
    assert site.asked == ["small.pth"]


def test_fetch_turns_to_the_next_mirror(site, tmp_path, monkeypatch, released):
    site.files["wrong.pth"] = released[:-1] + b"x"
    site.files["good.pth"] = released
    mirrors = [site.url(f"{kind}.pth") for kind in ("missing", "wrong", "good")]
    name = publish(monkeypatch, mirrors, released)
    fetch(name, cache_dir=tmp_path, retry=QUICK)
    assert weights_info(name, tmp_path).source == site.url("good.pth")
    assert site.asked == ["missing.pth", "wrong.pth", "good.pth"]


def test_fetch_says_what_went_wrong_at_every_mirror(site, tmp_path, monkeypatch, released):
    site.files["wrong.pth"] = released[:-1] + b"x"
    mirrors = [site.url("missing.pth"), site.url("wrong.pth")]
    name = publish(monkeypatch, mirrors, released)
    with pytest.raises(DownloadFailed, match=r"missing\.pth .*404.*; .*wrong\.pth has the SHA-256"):
        fetch(name, cache_dir=tmp_path, retry=QUICK)


def test_fetch_refuses_and_removes_a_file_with_another_hash(site, tmp_path, released):
    site.files["a.pth"] = released
    with pytest.raises(HashMismatch, match=r"expected 0{64}"):
        fetch(site.url("a.pth"), expected_sha256="0" * 64, cache_dir=tmp_path, retry=QUICK)
    assert [p for p in tmp_path.rglob("*.pth*")] == []
    assert [p for p in tmp_path.rglob("*.safetensors") if not p.name.startswith(".")] == []


def test_fetch_checks_the_hash_of_what_is_cached_too(site, tmp_path, ours):
    site.files["a.safetensors"] = ours
    url, right = site.url("a.safetensors"), hashlib.sha256(ours).hexdigest()
    fetch(url, cache_dir=tmp_path, retry=QUICK)
    fetch(url, expected_sha256=right, cache_dir=tmp_path, retry=QUICK)
    assert len(site.asked) == 1
    with pytest.raises(HashMismatch):
        fetch(url, expected_sha256="0" * 64, cache_dir=tmp_path, retry=QUICK)


def test_fetch_takes_a_hash_in_capitals(site, tmp_path, ours):
    site.files["a.safetensors"] = ours
    capitals = f"{hashlib.sha256(ours).hexdigest().upper()}\n"
    path = fetch(
        site.url("a.safetensors"), expected_sha256=capitals, cache_dir=tmp_path, retry=QUICK
    )
    assert path.read_bytes() == ours


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "g" * 64, "md5:" + "0" * 60])
def test_fetch_asks_for_nothing_where_the_hash_could_be_no_file_s(site, tmp_path, digest):
    with pytest.raises(ValueError, match=r"no SHA-256: expected 64 hexadecimal digits"):
        fetch(site.url("a.pth"), expected_sha256=digest, cache_dir=tmp_path, retry=QUICK)
    assert not site.asked


def test_fetch_removes_a_page_that_came_instead_of_weights(site, tmp_path, ours):
    site.files["a.safetensors"] = b"<!DOCTYPE html> please log in"
    with pytest.raises(ValueError, match="not a safetensors file"):
        fetch(site.url("a.safetensors"), cache_dir=tmp_path, retry=QUICK)
    site.files["a.safetensors"] = ours
    assert fetch(site.url("a.safetensors"), cache_dir=tmp_path, retry=QUICK).read_bytes() == ours


def test_fetch_keeps_a_verified_download_that_could_not_be_imported(site, tmp_path):
    site.files["a.pth"] = body = b"PK\x03\x04 but no archive"
    expected = hashlib.sha256(body).hexdigest()
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            fetch(site.url("a.pth"), expected_sha256=expected, cache_dir=tmp_path, retry=QUICK)
    assert site.asked == ["a.pth"]


def test_fetch_names_what_is_neither_known_nor_a_url(tmp_path):
    with pytest.raises(WeightsMissing, match="cut3r_512_dpt"):
        fetch("nothing", cache_dir=tmp_path)


def test_load_model_fetches_a_url_once(site, tmp_path, ours):
    site.files["a.safetensors"] = ours
    first, info = load_model(site.url("a.safetensors"), cache_dir=tmp_path)
    second, _ = load_model(site.url("a.safetensors"), cache_dir=tmp_path)
    assert site.asked == ["a.safetensors"]
    assert info.config == TINY
    assert torch.equal(first.decoder_embed.weight, second.decoder_embed.weight)


def test_load_model_asks_to_fetch_a_pth_url_first(site, tmp_path, released):
    url = site.url("small.pth")
    site.files["small.pth"] = released
    with pytest.raises(ValueError, match="run `ttt3r weights fetch"):
        load_model(url, cache_dir=tmp_path)
    fetch(url, cache_dir=tmp_path, retry=QUICK)
    assert load_model(url, cache_dir=tmp_path)[0].config == NARROW


def test_load_model_takes_other_fsspec_urls(tmp_path, ours):
    url = (tmp_path / "ours.safetensors").as_uri()
    assert load_model(url, cache_dir=tmp_path / "cache")[1].name == "tiny"
    assert len(list((tmp_path / "cache" / "weights").glob("ours-*.safetensors"))) == 1


def test_weights_info_reads_the_header_of_a_url_without_fetching_it(tmp_path, ours):
    url = (tmp_path / "ours.safetensors").as_uri()
    assert weights_info(url, tmp_path / "cache").segment_frames == 20
    assert not (tmp_path / "cache").exists()


def test_list_weights_tells_bundled_cached_and_fetchable_apart(
    site, tmp_path, monkeypatch, released
):
    name = publish(monkeypatch, [site.url("small.pth")], released)
    before = {entry.name: entry for entry in list_weights(tmp_path)}
    assert before[name].where == "fetchable"
    assert before[name].size_bytes == len(released)
    assert before["cut3r_512_dpt"].size_bytes == 3_173_761_006
    assert before["cut3r_512_dpt"].licence == "CC BY-NC-SA 4.0"
    assert (before["untrained"].where, before["untrained"].trained) == ("bundled", False)
    site.files["small.pth"] = released
    path = fetch(name, cache_dir=tmp_path, retry=QUICK)
    after = {entry.name: entry for entry in list_weights(tmp_path)}
    assert (after[name].where, after[name].path) == ("cached", path)
    assert after[name].size_bytes == path.stat().st_size


def test_list_weights_shows_a_damaged_file_as_unusable(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "broken.safetensors").write_bytes(b"x")
    entry = next(e for e in list_weights(tmp_path) if e.name == "broken")
    assert entry.notes.startswith("unusable")


def test_plain_url_resolves_files_of_the_hub():
    resolved = "https://huggingface.co/liguang0115/cut3r/resolve/main/cut3r_512_dpt_4_64.pth"
    assert plain_url("hub:liguang0115/cut3r/cut3r_512_dpt_4_64.pth") == resolved
    assert plain_url("hf://liguang0115/cut3r/cut3r_512_dpt_4_64.pth") == resolved
    assert plain_url("hub:a/b@v1.0/c/d.pth") == "https://huggingface.co/a/b/resolve/v1.0/c/d.pth"
    assert plain_url("s3://bucket/x.safetensors") == "s3://bucket/x.safetensors"
    assert plain_url("folder/x.safetensors") is None
    with pytest.raises(ValueError, match="hub:ORG/REPO"):
        plain_url("hub:only-one-part")


@pytest.mark.slow
def test_weights_on_s3_are_described_fetched_and_loaded(seaweed, tmp_path, ours):
    seaweed.filesystem().pipe(f"{seaweed.bucket}/weights/ours.safetensors", ours)
    url = f"{seaweed.url}/weights/ours.safetensors"
    assert weights_info(url, tmp_path).name == "tiny"
    assert not (tmp_path / "weights").exists()
    _, info = load_model(url, cache_dir=tmp_path)
    assert info.name == "tiny"


@pytest.mark.slow
def test_fetch_names_an_s3_object_that_is_not_there(seaweed, tmp_path):
    with pytest.raises(DownloadFailed, match=r"s3://.*none\.safetensors"):
        fetch(f"{seaweed.url}/none.safetensors", cache_dir=tmp_path, retry=QUICK)
