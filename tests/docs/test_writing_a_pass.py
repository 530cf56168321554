"""docs/writing_a_pass.md: its code runs, from the first block to the last, and its golden test holds."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

from fp8c.pass_manager import PassManager
from fp8c.tools import opt
from tests.golden.test_golden import make_model
from tests.golden.test_golden import load as load_golden

PAGE = (Path(__file__).parents[2] / "docs" / "writing_a_pass.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run_page() -> ModuleType:
    """All Python blocks, one after the other, in one module."""
    module = ModuleType("fp8c_page")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec("from __future__ import annotations\n", module.__dict__)
    for block in PYTHON:
        exec(compile(block, "docs/writing_a_pass.md", "exec"), module.__dict__)
    return module


def test_every_block_runs() -> None:
    assert len(PYTHON) >= 6
    module = run_page()
    assert module.DropDoubleTransposes.name == "drop-double-transposes"


def test_the_golden_test_of_the_page_holds(tmp_path: Path) -> None:
    text = next(b for b in re.findall(r"^   ```\n(.*?)^   ```", PAGE, re.DOTALL | re.MULTILINE) if "# CHECK" in b)
    file = tmp_path / "page.py"
    file.write_text(textwrap.dedent(text))
    module, args, kwargs = make_model(load_golden(file))
    step = opt.capture_joint(module, *args, **kwargs)
    before = opt.run_passes(step, passes=["assign-roles"])
    before.graph = PassManager({}).run(before.graph, [run_page().DropDoubleTransposes()], before.ctx)
    done = subprocess.run(
        [sys.executable, "-m", "filecheck", str(file)],
        input=before.text(provenance=False),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_page_names_exists() -> None:
    root = Path(__file__).parents[2]
    for path in re.findall(r"`((?:fp8c|passes|tests)/[\w/]+\.py)`", PAGE):
        assert (root / path).exists() or path == "passes/drop_double_transposes.py", path
