"""The viewer's page: data, style, scripts and the layout library put into one file that asks no network for anything.

The scripts in `web/` are parts of one; `vendor/dagre.min.js` (@dagrejs/dagre 3.1.3, MIT, licence beside it) finds where
boxes lie. The page's policy allows exactly these scripts, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8c.tools.viewer.page_data import packed

_FOLDER = Path(__file__).parent
_SCRIPTS = ("data.js", "layout.js", "canvas.js", "panel.js", "panel_module.js", "tables.js", "search.js", "main.js")
_PLACES = re.compile(r"(__SCRIPT_HASHES__|__STYLE__|__DATA__|__DAGRE__|__SCRIPT__)")


def page(data: Mapping[str, Any]) -> bytes:
    """The page for what `page_data` returned."""
    dagre = (_FOLDER / "vendor" / "dagre.min.js").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join(_read(name) for name in _SCRIPTS)
    values = {
        "__SCRIPT_HASHES__": " ".join(f"'sha256-{_digest(text)}'" for text in (dagre, script)),
        "__STYLE__": _read("style.css"),
        "__DATA__": packed(data),
        "__DAGRE__": dagre,
        "__SCRIPT__": script,
    }
    return "".join(values.get(part, part) for part in _PLACES.split(_read("page.html"))).encode()


def _read(name: str) -> str:
    return (_FOLDER / "web" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
