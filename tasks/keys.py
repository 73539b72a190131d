"""The key of a stage: what its result depends on, as one hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any


def stage_key(stage: str, version: int, *inputs: Any) -> str:
    """Hash a stage's name, code version, the keys of its inputs and its settings.

    `inputs` are strings, numbers, dataclasses, or dicts and lists of these. Equal inputs give
    equal keys on every machine.
    """
    plain = [asdict(i) if is_dataclass(i) and not isinstance(i, type) else i for i in inputs]
    text = json.dumps([stage, version, *plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
