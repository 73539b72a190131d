import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import numpy as np
import plotly.graph_objects as go
import pytest

from storage import upkeep
from storage.errors import DataDamaged
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan, Segment
from tasks import fuse
from tasks import report_figures as figures
from tasks.align import align_stage
from tasks.config import AlignConfig, FuseConfig
from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage
from tasks.meshes import Mesh
from tasks.plan import plan_stage
from tasks.report import embed, report_stage

EVIL = "</script><script>alert(1)</script>"
FUSE = FuseConfig(voxel_m=0.15, depth_limit_m=6.0, smallest_piece=1, preview_triangles=500)


def fuse_drive(drive, config=FUSE) -> ReconstructionStore:
    for batch in range(plan_tiles_stage.fn(drive.url, config)):
        fuse_tiles_stage.fn(drive.url, [batch], config, drive.config.infer)
    merge_tiles_stage.fn(drive.url, config)
    return ReconstructionStore.open(drive.url)


@pytest.fixture(scope="module")
def aligned_once(inferred_corridor, tmp_path_factory):
    """For all tests of this file, which copy it."""
    drive = inferred_corridor.copy(tmp_path_factory.mktemp("aligned"))
    align_stage.fn(drive.url, AlignConfig(), drive.config.infer)
    return drive


@pytest.fixture(scope="module")
def fused_once(aligned_once, tmp_path_factory):
    """For all tests of this file, which copy it."""
    drive = aligned_once.copy(tmp_path_factory.mktemp("fused"))
    fuse_drive(drive)
    return drive


@pytest.fixture
def aligned(aligned_once, tmp_path):
    return aligned_once.copy(tmp_path)


@pytest.fixture
def fused(fused_once, tmp_path) -> ReconstructionStore:
    return ReconstructionStore.open(fused_once.copy(tmp_path).url)


@pytest.fixture
def recording(inferred_corridor, tmp_path) -> Path:
    """A copy of the recording, of the test's own."""
    source = ReconstructionStore.open(inferred_corridor.url).attributes["drive"]["location"]
    return Path(shutil.copy(source, tmp_path))


def page_of(store: ReconstructionStore) -> str:
    report_stage.fn(store.url)
    return store.get_file("report/report.html").decode()


class Reader(HTMLParser):
    """What a browser sees: scripts, and text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def test_report_is_not_made_anew_unless_what_it_shows_changes(fused):
    report_stage.fn(fused.url)
    first = fused.read_commit("report")["commit_id"]
    report_stage.fn(fused.url)
    assert fused.read_commit("report")["commit_id"] == first
    attributes = fused.attributes
    configuration = {**attributes["configuration"], "fuse": {"voxel_m": 0.125}}
    for name, value, shown in (
        ("configuration", configuration, "voxel_m = 0.125"),
        ("versions", {**attributes["versions"], "torch": "9.9.9"}, "torch 9.9.9"),
        ("weights", {**attributes["weights"], "licence": "a licence of its own"}, "of its own"),
    ):
        before = fused.read_commit("report")["commit_id"]
        fused.update_attributes({name: value})
        assert shown in page_of(fused)
        assert fused.read_commit("report")["commit_id"] != before


def test_new_trajectory_makes_a_new_report_even_of_the_same_mesh(fused):
    report_stage.fn(fused.url)
    before = fused.read_commit("report")["commit_id"]
    fused.commit("align", {**fused.read_commit("align"), "key": "another"})
    report_stage.fn(fused.url)
    assert fused.read_commit("report")["commit_id"] != before


def test_settings_are_shown_as_they_were_used_and_figures_with_units(aligned):
    config = FuseConfig(smallest_piece=1, preview_triangles=500)
    store = fuse_drive(aligned, config)
    attributes = store.attributes
    plan = {**attributes["configuration"]["plan"], "segment_frames": None, "overlap_frames": None}
    store.update_attributes(
        {"configuration": {**attributes["configuration"], "plan": plan, "fuse": asdict(config)}}
    )
    grid = store.read_commit("tiles/0000")["grid"]
    text = Reader(page_of(store)).text
    for said in (
        "segment_frames = 24 (derived), overlap_frames = 8 (derived), chunk_frames = 8",
        "focal_px = 50 (derived), scale_prior_sigma = 0.3",
        f"voxel_m = {grid['voxel_m']:.4g} (derived)",
        f"depth_limit_m = {grid['depth_limit_m']:.4g} (derived)",
        "min_confidence = 5 (derived)",
        "duration4.0 s",
        "focal length50.0 pixels of the recording",
    ):
        assert said in text
    assert "None" not in text
    assert not re.search(r"[0-9]\.[0-9]{6}", text)


def test_settings_that_differ_between_parts_are_shown_as_a_range(fused):
    record = fused.read_commit("tiles/0000")
    grid = {**record["grid"], "voxel_m": 0.3, "min_confidence": None}
    fused.commit("tiles/0001", {**record, "part": 1, "grid": grid})
    configuration = fused.attributes["configuration"]
    fuse = {**configuration["fuse"], "voxel_m": None, "depth_limit_m": 6.00001}
    fused.update_attributes({"configuration": {**configuration, "fuse": fuse}})
    text = Reader(page_of(fused)).text
    assert "voxel_m = 0.15 to 0.3 (derived), depth_limit_m = 6.00001," in text
    assert "min_confidence = 5 (derived)" in text


def test_world_is_said_to_be_that_of_the_part_that_is_shown(corridor_drive, fused_once, tmp_path):
    drive, store = corridor_drive, ReconstructionStore.open(corridor_drive.url)
    record = DriveRecord.from_json(store.attributes["drive"])
    store.update_attributes({"drive": replace(record, cuts=(14,)).to_json()})
    plan_stage.fn(drive.url, drive.config)
    drive = replace(drive, scales=(1.0, 1.25, 1.25))
    drive.infer_perfectly()
    align_stage.fn(drive.url, AlignConfig(), drive.config.infer)
    text = Reader(page_of(fuse_drive(drive))).text
    assert "the camera of the first frame of this part. Shown: the longest of 2 parts" in text
    whole = ReconstructionStore.open(fused_once.copy(tmp_path / "whole").url)
    assert "the camera of the first frame. " in Reader(page_of(whole)).text


def test_colours_of_the_strip_are_said_to_be_of_their_own_frame(fused):
    depth, sure = np.linspace(1, 5, 100).reshape(10, 10), np.linspace(1, 2, 100).reshape(10, 10)
    for one, other in zip(
        figures.strip_cells(None, depth, sure),
        figures.strip_cells(None, depth * 3, sure**3),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2)  # so they do not compare
    said = "Both are relative to their own frame: colours of two frames do not compare."
    assert said in Reader(page_of(fused)).text


@pytest.mark.parametrize(
    ("focal_px", "is_told"),
    [(25.0, True), (39.0, True), (41.0, False), (60.0, False), (64.0, True)],
)
def test_given_focal_length_far_from_what_the_network_sees_is_told(aligned, focal_px, is_told):
    align_stage.fn(aligned.url, AlignConfig(focal_px=focal_px), aligned.config.infer)  # sees 50
    store = fuse_drive(aligned)
    said = f"takes the focal length for {50 / focal_px:.2g} times the one that was given"
    text = Reader(page_of(store)).text
    assert (said in text) == is_told
    assert "is the network's estimate, and widths" not in text


@pytest.mark.parametrize(("spread", "scatter"), [(0.1, ""), (0.3, ", from estimates that scatter")])
def test_estimated_focal_length_is_said_to_be_one_once(fused, spread, scatter):
    fused.commit("align", {**fused.read_commit("align"), "focal_spread": spread})
    text = Reader(page_of(fused)).text
    assert f"focal length, 50 pixels of the recording, is the network's estimate{scatter}" in text
    assert text.count("give it with --focal-px") == 1


def test_report_shows_frames_of_the_recording_that_is_named_only(fused, recording):
    page = page_of(fused)
    assert page.count('alt="frame"') == 0
    assert page.count('alt="depth"') == 6
    assert "Frames of the recording are not shown" in Reader(page).text
    report_stage.fn(fused.url, str(recording))
    page = fused.get_file("report/report.html").decode()
    assert page.count('alt="frame"') == 6
    assert "Frames of the recording are not shown" not in Reader(page).text


def test_report_opens_nothing_but_the_recording_whatever_a_store_names(fused, recording, tmp_path):
    drive = fused.attributes["drive"]
    (tmp_path / "mine").mkdir()
    mine = shutil.copy(recording, tmp_path / "mine" / "corridor.mp4")
    private = shutil.move(recording, tmp_path / "private.mp4")

    def name(location: str, clip: str) -> None:
        clips = [{**drive["clips"][0], "location": clip}]
        fused.update_attributes({"drive": {**drive, "location": location, "clips": clips}})

    for location, clip, given in (
        (str(tmp_path), str(private), str(tmp_path / "mine")),
        (str(tmp_path / "mine"), str(private), str(tmp_path / "mine")),
        ("/nowhere", "/nowhere/../private.mp4", str(tmp_path / "mine")),
        ("/nowhere", str(private), str(mine)),
        (str(mine), str(private), str(mine)),
    ):
        name(location, clip)
        with pytest.raises(ValueError, match="which is not part of"):
            report_stage.fn(fused.url, given)
        private.rename(tmp_path / "gone")  # what is not there cannot be opened
        assert 'alt="frame"' not in page_of(fused)
        (tmp_path / "gone").rename(private)
    name("/nowhere", "/nowhere/corridor.mp4")
    report_stage.fn(fused.url, str(tmp_path / "mine"))
    assert fused.get_file("report/report.html").decode().count('alt="frame"') == 6


def test_damaged_report_is_named_and_made_anew(fused):
    page = page_of(fused)
    assert upkeep.verify(fused) == []
    with fsspec.open(fused.file_url("report/report.html"), "wb") as file:
        file.write(page.replace("metres", "furlongs").encode())
    assert upkeep.verify(fused) == ["report/report.html"]
    assert upkeep.repair(fused) == ["report"]
    assert "furlongs" not in page_of(fused)
    assert upkeep.verify(fused) == []


def test_preview_that_is_gone_is_damage(fused):
    fused.delete_files("fusion/preview.ply")
    with pytest.raises(DataDamaged, match=r"fusion/preview.ply of .* is gone; run `ttt3r repair"):
        report_stage.fn(fused.url)


def test_names_from_outside_cannot_break_out_of_the_page(fused):
    attributes = fused.attributes
    plain_scripts = len(Reader(page_of(fused)).scripts)
    fused.update_attributes(
        {
            "drive": {**attributes["drive"], "name": EVIL, "codec": EVIL, "problems": [EVIL]},
            "weights": {**attributes["weights"], "licence": EVIL, "source": EVIL},
            "versions": {EVIL: EVIL},
        }
    )
    page = page_of(fused)
    assert EVIL not in page
    seen = Reader(page)
    assert len(seen.scripts) == plain_scripts
    assert not any("alert(1)" in script for script in seen.scripts)
    assert seen.text.count(EVIL) >= 5  # shown as text


def test_names_cannot_break_out_of_a_plot():
    figure = go.Figure(go.Scatter(x=[0], y=[1], name=EVIL))
    figure.update_layout(title=EVIL)
    page = embed(figure)
    assert EVIL not in page
    assert len(Reader(page).scripts) == len(Reader(embed(go.Figure())).scripts)


def test_report_names_the_mesh_that_exists(aligned, monkeypatch):
    page = page_of(fuse_drive(aligned))
    assert "corridor.zarr/fusion/mesh.glb" in page
    monkeypatch.setattr(fuse, "LARGEST_GLB_TRIANGLES", 10)
    store = ReconstructionStore.open(aligned.url)
    store.drop_commits("tiles")
    page = page_of(fuse_drive(aligned))
    assert "mesh.glb" not in page
    assert "corridor.zarr/fusion/mesh.ply" in page


def test_report_of_a_store_whose_commits_list_no_files(fused):
    record = fused.read_commit("fuse/merged")
    fused.commit("fuse/merged", {name: record[name] for name in ("key", "meshes", "seconds")})
    assert "corridor.zarr/fusion/mesh.glb" in page_of(fused)


def test_report_of_an_empty_mesh_names_no_mesh(aligned):
    page = page_of(fuse_drive(aligned, FuseConfig(voxel_m=0.15, smallest_piece=10**9)))
    assert "No surface was seen often enough" in page
    assert "mesh.glb" not in page
    assert "mesh.ply" not in page


def test_uniform_confidence_is_grey_and_says_so(fused):
    image = np.zeros((4, 6, 3), np.uint8)
    depth = np.full((4, 6), 2.0)
    even = figures.strip_cells(image, depth, np.full((4, 6), 5.0))[2]
    assert len(np.unique(even)) == 1  # red = green = blue, the same everywhere
    graded = figures.strip_cells(image, depth, np.linspace(1, 9, 24).reshape(4, 6))[2]
    assert len(np.unique(graded)) > 20
    # The corridor's confidence is 5 all over: a note on each of six thumbnails.
    assert page_of(fused).count("<span>uniform</span>") == 6


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to lay the page out")
def test_strip_fits_into_its_box_on_wide_and_narrow_screens(fused, tmp_path):
    page = re.sub("<script.*?</script>", "", page_of(fused), flags=re.DOTALL)
    probe = """<script>
      const box = document.querySelector(".strip").closest("section").getBoundingClientRect();
      const cells = [...document.querySelectorAll(".strip img")];
      const right = Math.max(...cells.map(cell => cell.getBoundingClientRect().right));
      const rows = new Set(cells.map(cell => Math.round(cell.getBoundingClientRect().top)));
      document.title = `${cells.length} images, ${rows.size} rows, fits: ${right < box.right}`;
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    assert title_at(file, 1120) == "18 images, 3 rows, fits: true"
    assert re.fullmatch(r"18 images, (6|9|18) rows, fits: true", title_at(file, 500))


def title_at(file, width: int) -> str:
    """Title of a page that a browser laid out, `width` pixels wide."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options += [f"--user-data-dir={file.parent / 'profile'}", "--dump-dom"]
    command = ["chromium", *options, file.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return re.search("<title>(.*?)</title>", found.stdout).group(1)


def long_drive(frames: int):
    """A long curve in segments of 100 frames, with one spike in its curves."""
    T = np.tile(np.eye(4), (frames, 1, 1))
    T[:, 0, 3], T[:, 2, 3] = np.sin(np.arange(frames) / 1e4) * 500, np.arange(frames) * 0.5
    count = frames // 100
    segments = tuple(Segment(i, 100 * i, 100 * (i + 1), 0) for i in range(count))
    curve = np.ones(frames, np.float32)
    curve[34_567], curve[45_678], curve[50_000:50_300] = 9, -9, np.nan
    per_segment = np.linspace(0, 1, count)
    trajectory = {
        "cam_to_world": T,
        "part": np.zeros(frames, np.int32),
        "segment": np.arange(frames) // 100,
        **{name: curve for name in ("confidence", "gate", "focal")},
        **{name: per_segment for name in ("seam_residual", "scale")},
    }
    return trajectory, np.arange(frames) / 10, Plan(frames, 32, segments)


def test_long_drive_makes_a_small_page_that_keeps_its_peaks():
    trajectory, timestamp, plan = long_drive(100_000)
    over_time = figures.over_time(trajectory, timestamp, plan)
    mesh = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]]), np.zeros((3, 3), np.uint8))
    plots = [figures.top_view(trajectory, 0), figures.scene(mesh, trajectory, 0), over_time]
    lines = [trace for plot in plots for trace in plot.data if trace.type != "mesh3d"]
    assert max(len(line.x) for line in lines) <= figures.POINTS_SHOWN
    assert sum(len(embed(plot)) for plot in plots) < 1_000_000
    for line in over_time.data[:3]:
        peaks = {(x, y) for x, y in zip(line.x, line.y, strict=True) if abs(y) == 9}
        assert peaks == {(3456.7, 9), (4567.8, -9)}
        assert np.isnan(line.y).any()  # a gap stays a gap
        assert (line.x[0], line.x[-1]) == (0, 9999.9)
    path = plots[0].data[0]
    assert (path.y[0], path.y[-1]) == (0, 49_999.5)


def test_short_drive_is_shown_frame_by_frame():
    trajectory, timestamp, plan = long_drive(100_000)
    short = {name: values[:400] for name, values in trajectory.items()}
    plan = Plan(400, 32, plan.segments[:4])
    short |= {name: short[name][:4] for name in ("seam_residual", "scale")}
    assert len(figures.top_view(short, 0).data[0].x) == 400
    assert len(figures.over_time(short, timestamp[:400], plan).data[0].x) == 400


def test_report_names_what_inference_is_limited_by(fused):
    # By hand: of one chunk, 3 s of decoding and 1 s of resizing, 2 s of network, 1 s of writing.
    seconds = {"decode": 3.0, "preprocess": 1.0, "infer": 2.0, "write": 1.0}
    name, record = next(iter(fused.commits("infer").items()))
    fused.commit(name, {**record, **{f"{stage}_seconds": s for stage, s in seconds.items()}})
    text = Reader(page_of(fused)).text
    assert "reading; in its time, network 50% and writing 25% busy" in text
