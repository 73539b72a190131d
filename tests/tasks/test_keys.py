from tasks.config import AlignConfig, ReconstructionConfig
from tasks.keys import stage_key


def test_key_is_the_same_for_equal_inputs():
    assert stage_key("align", 1, ["a"], AlignConfig()) == stage_key(
        "align", 1, ["a"], AlignConfig()
    )


def test_key_changes_with_stage_version_inputs_and_settings():
    keys = {
        stage_key("align", 1, ["a"], AlignConfig()),
        stage_key("fuse", 1, ["a"], AlignConfig()),
        stage_key("align", 2, ["a"], AlignConfig()),
        stage_key("align", 1, ["b"], AlignConfig()),
        stage_key("align", 1, ["a"], AlignConfig(focal_px=500.0)),
    }
    assert len(keys) == 5


def test_default_config_is_valid():
    assert ReconstructionConfig().infer.rule == "ttt3r"
