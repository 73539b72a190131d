from tasks.config import AlignConfig
from tasks.keys import stage_key


def test_key_is_the_same_in_every_process_and_version():
    """Another would have every drive that is finished computed again."""
    settings = AlignConfig(focal_px=500.0, scale_prior_sigma=0.25)
    digest = "2009bb92080a53920194d48f98029f83da2dc0f6522cc16b2ad9cde850fca046"
    assert stage_key("align", 1, ["a"], settings) == digest


def test_key_changes_with_stage_version_inputs_and_settings():
    keys = {
        stage_key("align", 1, ["a"], AlignConfig()),
        stage_key("fuse", 1, ["a"], AlignConfig()),
        stage_key("align", 2, ["a"], AlignConfig()),
        stage_key("align", 1, ["b"], AlignConfig()),
        stage_key("align", 1, ["a"], AlignConfig(focal_px=500.0)),
    }
    assert len(keys) == 5
