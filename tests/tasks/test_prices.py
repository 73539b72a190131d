from pathlib import Path

import pytest

from tasks.prices import read_prices

TABLE = """
currency = "EUR"
per_cpu_hour = 0.1
per_gb_month = 0.02
months_stored = 3
[per_gpu_hour]
"NVIDIA H100" = 4.0
cpu = 0.1
"""


def test_cost_is_hours_and_storage_times_their_prices(tmp_path):
    (tmp_path / "prices.toml").write_text(TABLE)
    prices = read_prices(str(tmp_path / "prices.toml"))
    assert prices.cost({"NVIDIA H100": 2.0}, 5.0, 10e9) == pytest.approx(8.0 + 0.5 + 0.6)
    assert prices.cost({"NVIDIA H100": 2.0}, None, 10e9) is None
    assert prices.cost({"NVIDIA A10": 2.0}, 5.0, 10e9) is None
    mixed = {"NVIDIA H100": 2.0, "cpu": 10.0}
    assert prices.cost(mixed, 5.0, 10e9) == pytest.approx(8.0 + 1.0 + 0.5 + 0.6)
    assert prices.cost({**mixed, "NVIDIA A10": 1.0}, 5.0, 10e9) is None
    with pytest.raises(ValueError, match="'NVIDIA H100', 'cpu', none for 'NVIDIA A10'"):
        prices.require_price("NVIDIA A10")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("currency = ", "Invalid value"),
        ('currency = "EUR"\nper_cpu_hour = 1', "per_gpu_hour"),
        (TABLE.replace("4.0", "-4.0"), "greater than or equal to 0"),
        (TABLE.replace("4.0", "inf"), "finite"),
        ("per_hour = 3\n" + TABLE, "per_hour"),
        ("# " + "x" * 200_000, "larger"),
    ],
)
def test_what_is_no_price_table_is_said(tmp_path, text, said):
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_prices(str(tmp_path / "prices.toml"))
    assert "prices.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_in_deploy_is_one():
    prices = read_prices(str(Path(__file__).parents[2] / "deploy" / "prices.toml"))
    assert prices.cost({"cpu": 1.0}, 1.0, 1e9) > 0
