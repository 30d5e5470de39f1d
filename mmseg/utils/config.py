"""Config files: read, override, validate."""
from __future__ import annotations

from typing import Any

from mmengine.config import Config


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Reads a Python config file with ``_base_`` and applies dotted overrides."""
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    return cfg
