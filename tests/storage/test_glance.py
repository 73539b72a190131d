from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from recordings import moving_squares, write_video

from storage.glance import glance_at
from storage.media import UnreadableVideo


def test_glance_counts_frames_of_all_clips_from_their_headers(tmp_path):
    write_video(tmp_path / "a.mp4", moving_squares(12), rate=8)
    write_video(tmp_path / "b.mkv", moving_squares(16), rate=8)  # states no number of frames
    seen = glance_at(str(tmp_path))
    assert seen.frames == 28
    assert seen.duration_s == pytest.approx(3.5)


@pytest.mark.parametrize("jump_s", [40 * 3600, 54 * 365 * 86400])
@pytest.mark.parametrize("jumps_at", [0, 6])
def test_clock_that_jumps_or_begins_late_promises_no_more_frames(tmp_path, jump_s, jumps_at):
    path = tmp_path / "clock.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.time_base = 64, 48, Fraction(1, 8)
        for i, picture in enumerate(moving_squares(12)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i + 8 * jump_s * (i >= jumps_at), Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    seen = glance_at(str(path))
    assert seen.frames == 12
    assert seen.duration_s == pytest.approx(12 / 8, rel=0.2)


def test_glance_counts_images_of_a_folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    assert glance_at(str(tmp_path)).frames == 3


def test_glance_at_what_is_no_video_says_what_to_do(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UnreadableVideo, match=r"text\.mp4: not a video"):
        glance_at(str(tmp_path / "text.mp4"))
