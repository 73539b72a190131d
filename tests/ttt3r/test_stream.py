import gc

import numpy as np
import pytest
import torch

from ttt3r.images import normalise
from ttt3r.state import State
from ttt3r.stream import Stream, overlap_views

ALL = frozenset({"cam", "world", "rgb"})
FIELDS = ("camera_pose", "descriptor", "rate", "pointmap_cam", "confidence", "pointmap_world")


def joined(parts, name):
    return torch.cat([getattr(part, name) for part in parts], dim=1)


def test_stream_equals_one_run_over_the_whole_sequence(model, frames, close):
    images = frames(2, 9)
    expected, state = model.run(normalise(images), outputs=ALL)
    stream = Stream(model, 2, outputs=ALL, batch_frames=6)
    parts = [stream.feed(images[:, :4]), stream.feed(images[:, 4:5]), stream.feed(images[:, 5:])]
    for name in FIELDS:
        close(joined(parts, name), getattr(expected, name))
    close(stream.state.tokens, state.tokens)
    close(stream.state.pose_memory, state.pose_memory)


@pytest.mark.parametrize("frame", range(1, 6))
def test_stream_resumed_after_any_frame_goes_on_identically(model, frames, arrays_of, frame):
    images = frames(1, 6)
    reset = np.zeros((1, 6), bool)
    reset[0, 2] = True
    first, second = slice(0, frame), slice(frame, 6)
    uninterrupted = Stream(model)
    uninterrupted.feed(images[:, first], reset=reset[:, first])
    saved = arrays_of(uninterrupted.state)
    expected = uninterrupted.feed(images[:, second], reset=reset[:, second])

    resumed = Stream(model, state=State.from_arrays(saved))
    found = resumed.feed(images[:, second], reset=reset[:, second])
    for name in ("camera_pose", "pointmap_cam", "confidence", "descriptor", "rate"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(resumed.state.tokens, uninterrupted.state.tokens)
    assert torch.equal(resumed.state.pose_memory, uninterrupted.state.pose_memory)


def test_batch_size_changes_results_only_by_rounding(model, frames, close):
    images = frames(1, 7)
    small, large = Stream(model, batch_frames=1), Stream(model, batch_frames=100)
    one, other = small.feed(images), large.feed(images)
    close(one.pointmap_cam, other.pointmap_cam)
    close(one.camera_pose, other.camera_pose)
    close(small.state.tokens, large.state.tokens)


def test_feed_never_encodes_more_frames_than_asked(model, frames):
    seen = []
    model.patch_embed.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    Stream(model, 2, batch_frames=6).feed(frames(2, 7))
    assert seen == [6, 6, 2]


def test_lanes_of_a_stream_equal_streams_of_one_lane(model, frames, close):
    images = frames(3, 6)
    update = np.array([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]], bool)
    reset = np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]], bool)
    together = Stream(model, 3, batch_frames=12)
    found = together.feed(images, update=update, reset=reset)
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone = Stream(model, 1, batch_frames=4)
        expected = alone.feed(images[one], update=update[one], reset=reset[one])
        close(found.camera_pose[one], expected.camera_pose)
        close(found.pointmap_cam[one], expected.pointmap_cam)
        close(together.state.tokens[one], alone.state.tokens)
        assert torch.equal(together.state.first[one], alone.state.first)


def test_memory_does_not_grow_with_the_number_of_frames(model, frames):
    images = frames(1, 2)
    stream = Stream(model)

    def live_bytes():
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    stream.feed(images)
    before = live_bytes()
    for _ in range(20):
        stream.feed(images)
    assert live_bytes() == before


def test_predictions_of_a_stream_need_no_history(model, frames):
    predictions = Stream(model).feed(frames(1, 2))
    assert not predictions.pointmap_cam.requires_grad


def test_read_only_images_are_taken(model, frames):
    images = frames(1, 1)
    images.setflags(write=False)
    assert Stream(model).feed(images).camera_pose.shape == (1, 1, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lanes": 0}, "0 lanes"),
        ({"batch_frames": 0}, "batches of 0 frames"),
        ({"rule": "nope"}, "unknown update rule"),
    ],
)
def test_stream_refuses_what_it_cannot_do(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Stream(model, **arguments)


def test_stream_refuses_the_state_of_other_lanes(model):
    with pytest.raises(ValueError, match="the state has 2 lanes, the stream 1"):
        Stream(model, state=model.initial_state(2))


def test_feed_refuses_wrong_lanes_types_and_flags(model, frames):
    stream = Stream(model, 2)
    with pytest.raises(ValueError, match="with 2 lanes"):
        stream.feed(frames(3, 1))
    with pytest.raises(ValueError, match="expected uint8"):
        stream.feed(frames(2, 1).astype(np.float32))
    with pytest.raises(ValueError, match=r"reset is bool \(2, 3\)"):
        stream.feed(frames(2, 1), reset=np.zeros((2, 3), bool))


def test_overlap_views_show_the_frame_of_a_reset_twice():
    views = overlap_views(5, 2)
    assert views.frame.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert views.reset.tolist() == [False, True, False, False, True, False, False]
    assert views.kept.tolist() == [0, 1, 3, 4, 6]


def test_overlap_views_without_resets_are_the_frames():
    views = overlap_views(3, None)
    assert views.frame.tolist() == views.kept.tolist() == [0, 1, 2]
    assert not views.reset.any()


def test_overlap_views_refuse_an_interval_below_one():
    with pytest.raises(ValueError, match="every 0"):
        overlap_views(3, 0)
