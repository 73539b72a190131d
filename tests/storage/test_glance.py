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


def test_glance_counts_images_of_a_folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    assert glance_at(str(tmp_path)).frames == 3


def test_glance_at_what_is_no_video_says_what_to_do(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UnreadableVideo, match="ttt3r probe"):
        glance_at(str(tmp_path / "text.mp4"))
