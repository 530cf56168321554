"""The page as a file: one piece, nothing from the network, only its own scripts, hostile names harmless."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fp8c.build import read_build
from fp8c.tools.viewer.page import page
from fp8c.tools.viewer.page_data import Strings, _split_name, packed, page_data


def unpacked(text: str) -> Any:
    import gzip

    return json.loads(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def content(small_build: Path) -> str:
    return page(page_data(read_build(small_build))).decode()


def test_the_policy_allows_the_two_scripts_by_hash_and_nothing_else(content: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == 2
    assert policy[1].startswith("default-src 'none'")
    assert re.findall(r"'sha256-([^']*)'", policy[1]) == hashes


def test_nothing_is_asked_of_a_network(content: str) -> None:
    assert not re.search(r"<(link|img|iframe)|src=|@import|url\((?!#)", content)
    assert "sourceMappingURL" not in content


def test_the_vendored_library_comes_with_its_licence() -> None:
    import fp8c.tools.viewer as viewer

    vendor = Path(viewer.__file__).parent / "vendor"
    assert "Permission is hereby granted" in (vendor / "dagre.LICENSE").read_text()
    assert "dagre.LICENSE" in (vendor / "dagre.min.js").read_text()[:200]


def test_data_survives_packing_whatever_is_in_it() -> None:
    data = {"text": '</script><img onerror=alert(1)> \u2028 "%" __STYLE__ __DATA__', "numbers": [1, -1, 2.5, None]}
    text = packed(data)
    assert "<" not in text and "_" not in text
    assert unpacked(text) == data


@pytest.mark.parametrize("name", ["mm", "mm_15", "mm_015", "_15", "a_b", "getitem_1_q", "x_0"])
def test_names_are_put_together_again(name: str) -> None:
    base, number = _split_name(name)
    assert (base if number < 0 else f"{base}_{number}") == name


def test_strings_are_kept_once() -> None:
    strings = Strings()
    assert [strings(t) for t in ("a", "b", "a")] == [0, 1, 0]
    assert strings.to_json() == ["a", "b"]


def test_every_node_and_decision_is_in_the_data(small_build: Path) -> None:
    build = read_build(small_build)
    data = page_data(build)
    lock = build.json("plan.lock.json")
    lines = build.graph_text("forward").splitlines()
    forward = next(h for h in data["halves"] if (h["when"], h["direction"]) == ("after", "forward"))
    assert len(forward["op"]) == sum(" = " in line and " = input(" not in line for line in lines)
    assert {u[0] for u in data["uses"]} == set(lock["uses"])
    for key, path, *_, number, _, _ in data["uses"]:
        wanted = {(n, str(d["value"])) for n, d in lock["uses"][key]["fields"].items() if n[:6] != "retile"}
        assert wanted <= {(row[0], row[1]) for row in data["decisions"][number]}
