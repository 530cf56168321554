"""Where fp8c keeps what it need not make twice: compiled kernels, the accumulator model, the parsed grammar. No torch here.

Environment: FP8C_CACHE_DIR, a folder instead of the user's cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """The folder of one kind of cached files; it may not exist yet."""
    if "FP8C_CACHE_DIR" in os.environ:
        return Path(os.environ["FP8C_CACHE_DIR"]) / part
    from platformdirs import user_cache_path

    return user_cache_path("fp8c") / part
