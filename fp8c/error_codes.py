"""Every diagnostic code with its explanation; `fp8c explain CODE` prints it. Codes are permanent: never reuse one.

E01xx syntax · E02xx conflicts · E03xx matching · E04xx hardware · E05xx data flow · E06xx files and versions ·
E07xx broken invariants · E08xx models · W.... warnings and R.... remarks use the same hundreds.
"""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {}
