"""Prices: what an operator pays, as a table that he edits (`deploy/prices.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tasks.config import STRICT
from tasks.documents import read_document

LARGEST_TABLE_BYTES = 100_000
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Prices:
    """What an hour and a byte cost; tax, transfer and requests are not in it."""

    currency: str
    """What all prices are in."""
    per_gpu_hour: dict[str, Price]
    """Of a machine that infers, by kind of device, as ledgers name it: "cpu", "NVIDIA H100"."""
    per_cpu_hour: Price
    """Of a machine that runs the other stages."""
    per_gb_month: Price = 0.0
    """Of 10^9 bytes stored for a month."""
    months_stored: Price = 1.0
    """Months of storage that count to the cost of a drive."""

    def cost(
        self,
        hours_by_kind: Mapping[str, float | None],
        cpu_hours: float | None,
        stored_bytes: float | None,
    ) -> float | None:
        """Money for resources; None where one of them, or a device's price, is not known.

        Args:
            hours_by_kind: of machines that infer, by kind of device.
            cpu_hours: of the machines of the other stages.
            stored_bytes: for `months_stored`.
        """
        if stored_bytes is None and not self.per_gb_month * self.months_stored:
            stored_bytes = 0.0
        if cpu_hours is None or stored_bytes is None:
            return None
        stored = stored_bytes / 1e9 * self.per_gb_month * self.months_stored
        cost = cpu_hours * self.per_cpu_hour + stored
        for device_kind, hours in hours_by_kind.items():
            per_hour = self.per_gpu_hour.get(device_kind)
            if hours is None or per_hour is None:
                return None
            cost += hours * per_hour
        return cost

    def require_price(self, device_kind: str) -> None:
        """Refuse a table without a price for the device.

        Raises:
            ValueError: so it is.
        """
        if device_kind not in self.per_gpu_hour:
            known = ", ".join(map(repr, sorted(self.per_gpu_hour))) or "nothing"
            raise ValueError(
                f"the price table has a per_gpu_hour for {known}, none for {device_kind!r}; add it"
            )


def read_prices(location: str) -> Prices:
    """The price table in a TOML file; path or URL.

    Raises:
        ValueError: there is none, or it is not a price table; says what is wrong.
    """
    try:
        data = read_document(location, LARGEST_TABLE_BYTES)
        return TypeAdapter(Prices).validate_python(tomllib.loads(data.decode()))
    except FileNotFoundError:
        reason = "there is no such file"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{location} is not a price table: {reason}; see deploy/prices.toml")
