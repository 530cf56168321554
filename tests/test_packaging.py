"""pyproject.toml's package table must name every package folder, and the links must be real."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKED = ("passes", "backends", "specs", "tools")


def import_name(folder: Path) -> str:
    """`passes/fp8` -> `fp8c.passes.fp8`; `fp8c` stays `fp8c`."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "fp8c" else ("fp8c", *parts))


def test_every_package_folder_is_in_the_wheel() -> None:
    inits = [i for top in ("fp8c", *LINKED) for i in (ROOT / top).rglob("__init__.py")]
    assert {import_name(i.parent) for i in inits if i.resolve() == i} == set(SETUPTOOLS["packages"])


def test_import_links_lead_to_the_top_level_folders() -> None:
    for name in LINKED:
        assert (ROOT / "fp8c" / name).resolve() == ROOT / name
