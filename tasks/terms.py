"""What must be known of a result wherever its files go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.reconstruction import ReconstructionStore

LONGEST_LINE = 500  # so that headers of meshes stay short, whatever weights say of themselves


@dataclass(frozen=True)
class Terms:
    """Short lines of ASCII, for comments in files of all kinds."""

    weights: str
    licence: str
    scale: str = "metres are the network's estimate: nothing outside the video fixes the scale"

    @classmethod
    def of_weights(cls, weights: Mapping[str, Any]) -> Terms:
        """Terms of results by weights that are described so (`WeightsInfo.to_json`)."""
        name, source, licence = (weights.get(n, "unknown") for n in ("name", "source", "licence"))
        return cls(
            _one_line(f"made with the weights {name} ({source})"),
            _one_line(f"licence of the weights: {licence}"),
        )

    @property
    def lines(self) -> tuple[str, str, str]:
        """All that there is to say."""
        return self.scale, self.weights, self.licence


def read_terms(store: ReconstructionStore) -> Terms:
    """Terms of what is in a store."""
    return Terms.of_weights(store.attributes.get("weights", {}))


def _one_line(text: str) -> str:
    """Weights may come from anywhere: no line of theirs can end the comment that it stands in."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    plain = " ".join(printable.split()).encode("ascii", "backslashreplace").decode()
    # Readers of PLY, trimesh among them, look for this word anywhere in a line.
    return plain.replace("end_header", "end header")[:LONGEST_LINE]
