"""The page in a real browser: somebody clicks, types, searches and reads. Skipped where there is no Chromium.

Figures (README, docs/inspect.md) are held on a build as large as DeepSeek-V3's: 61 layers, more than 75,000 nodes.
Times are processor time of the page's main thread, which other work on the machine does not stretch.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp8c.build import read_build
from fp8c.tools.viewer.chromium import Browser, chromium, find_chromium
from fp8c.tools.viewer.page import page
from fp8c.tools.viewer.page_data import page_data

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("websocket") is None, reason="websocket-client is not installed"),
]

LAYERS_BOX = '#forward [data-id="fold:model.layers.0"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def small_page(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pages") / "small.html"
    path.write_bytes(page(page_data(read_build(small_build))))
    return path.as_uri()


@pytest.fixture
def small(browser: Browser, small_page: str) -> Iterator[Browser]:
    browser.open(small_page)
    yield browser
    assert browser.problems == []
    assert [r for r in browser.requests if not r.startswith(("file:", "about:"))] == []


def panel(browser: Browser) -> str:
    text: str = browser.evaluate("document.getElementById('panel').innerText")
    return text


def box(path: str, direction: str = "forward") -> str:
    return f'#{direction} [data-id="module:{path}"]'


def test_identical_layers_are_one_box_and_unfold(small: Browser) -> None:
    assert "layers 0–2" in small.texts(LAYERS_BOX)[0]
    assert "× 3" in small.texts(LAYERS_BOX)[0]
    small.click(f"{LAYERS_BOX} .head")
    assert small.evaluate(f"document.querySelector('{LAYERS_BOX}').getAttribute('aria-expanded')") == "true"
    inside = small.texts(f"{LAYERS_BOX} .box .name")
    assert {"norm", "attn", "mlp"} <= set(inside)
    assert small.texts('#backward [data-id="fold:model.layers.0"] .name')[1:], "the other direction unfolds with it"
    small.click(f"{LAYERS_BOX} .head")
    assert small.texts(f"{LAYERS_BOX} .box") == []


def test_another_of_the_identical_layers_can_be_shown(small: Browser) -> None:
    small.click(f"{LAYERS_BOX} .head")
    small.click(f'{LAYERS_BOX} [aria-label^="next"]')
    assert "model.layers.1" in panel(small).splitlines()[0]
    assert small.evaluate(f"document.querySelector('{LAYERS_BOX}').dataset.path") == "model.layers.1"


def test_the_panel_says_formats_scales_bytes_rules_and_the_source_line(small: Browser) -> None:
    small.click(f"{LAYERS_BOX} .head")
    small.click(f"{box('model.layers.0.attn')} .head")
    small.click(f"{box('model.layers.0.attn.q_proj')} .head")
    text = panel(small)
    for said in ("m × n × k = 256 × 512 × 512", "E4M3 1x128", "an FP32 scale for each 1×128 group", "gemm_fp8"):
        assert said in text, said
    assert "std:deepseek_v3:33" in text
    assert "132.0 KiB" in text or "132 KiB" in text  # 256 x 512 bytes and 256 x 4 scales of 4 bytes
    assert "BF16 256.0 KiB" in text
    assert "lib/moe.py:10" in text and "y = self.experts(x)" in text
    assert "because" in text


def test_what_a_rule_overrode_is_said(small: Browser) -> None:
    small.click(f"{LAYERS_BOX} .head")
    small.click(f"{box('model.layers.0.attn')} .head")
    small.click(f"{box('model.layers.0.attn.o_proj')} .head")
    assert "over E4M3 1x128 of gemm_fp8" in " ".join(panel(small).split())


def test_an_operator_shows_its_line_and_leads_to_its_partners(small: Browser) -> None:
    small.click(f"{LAYERS_BOX} .head")
    small.click(f"{box('model.layers.0.attn')} .head")
    small.click(f"{box('model.layers.0.attn.q_proj')} .head")
    small.click(f"{box('model.layers.0.attn.q_proj')} .box.op[data-node^=scaled_mm] .head")
    text = panel(small)
    assert "fp8c.scaled_mm(" in text and "'e4m3[1x128] fp32'" in text
    for said in ("GEMM\nfprop", "dgrad, backward", "wgrad, backward", "%mm"):
        assert said in text, said
    linked = small.texts("#backward .linked.op .gemm")
    assert sorted(linked) == ["dgrad", "wgrad"]


def test_before_and_after_switch_keeps_the_place(small: Browser) -> None:
    small.click(f"{LAYERS_BOX} .head")
    small.click(f"{box('model.layers.0.attn')} .head")
    small.click(f"{box('model.layers.0.attn.q_proj')} .head")
    small.click(f"{box('model.layers.0.attn.q_proj')} .box.op[data-node^=scaled_mm] .head")
    small.click("[data-when=before]")
    assert "aten.mm(" in panel(small)
    assert "before the rewrites" in panel(small)
    assert small.texts("#forward .selected .name") == ["mm"]
    assert not small.texts("#graph .badge.e4m3")
    small.click("[data-when=after]")
    assert "fp8c.scaled_mm(" in panel(small)


def test_search_by_module_operator_and_precision(small: Browser) -> None:
    def found(text: str) -> list[str]:
        small.evaluate("document.getElementById('search').value = ''")
        small.click("#search")
        small.type(text)
        return small.texts("#results .result")

    assert any("model.layers.0.mlp.gate" in t for t in found("mlp.gate"))
    assert all("scaled_grouped_mm" in t for t in found("scaled_grouped_mm forward"))
    assert any("× 3" in t for t in found("scaled_grouped_mm experts.up fprop"))
    assert all("E5M6" in t for t in found("quantize e5m6")) and found("router")
    assert found("no such thing") == []
    assert "nothing found" in small.texts("#results")[0]
    small.press("Escape")


def test_enter_on_a_result_shows_it_in_the_graph(small: Browser) -> None:
    small.press("/")
    small.type("scaled_mm o_proj fprop")
    small.press("Enter")
    assert small.evaluate("document.getElementById('results').hidden")
    assert "model.layers.0.attn.o_proj" in panel(small)
    assert small.evaluate("document.activeElement.classList.contains('selected')")


def test_keys_alone_unfold_walk_and_switch(small: Browser) -> None:
    small.evaluate(f"document.querySelector('{LAYERS_BOX}').focus()")
    small.press("Enter")
    assert small.texts(f"{LAYERS_BOX} .box")
    small.press("ArrowDown")
    first = small.evaluate("document.activeElement.dataset.id")
    small.press("ArrowDown")
    assert small.evaluate("document.activeElement.dataset.id") != first
    small.press("b")
    assert small.evaluate("document.querySelector('[data-when=before]').getAttribute('aria-pressed')") == "true"
    small.press("Escape")
    assert "GEMMs in FP8" in panel(small)


def test_an_address_opens_the_same_view(browser: Browser, small_page: str) -> None:
    browser.open(f"{small_page}#module=model.layers.2.attn.q_proj")
    assert "model.layers.2.attn.q_proj" in panel(browser).splitlines()[0]
    name = browser.evaluate("document.querySelector('#backward .box.op')?.dataset.node || ''")
    browser.open(f"{small_page}#when=before&half=forward&node=mm")
    assert panel(browser).startswith("%mm")
    assert name is not None and browser.problems == []


def test_a_value_with_many_readers_is_cut_into_references(small: Browser) -> None:
    found = small.evaluate("""(() => {
      const half = { isDrawn: () => true, sources: [new Set(), ...Array.from({ length: 12 }, (_, i) => new Set(i < 9 ? [0] : [1]))] };
      const { edges, cut } = joins(half, half.sources.map((_, i) => i), i => `node:${i}`, () => true);
      return [cut.map(e => e.from), edges.map(e => e.from)];
    })()""")
    assert found == [["node:0"] * 9, ["node:1"] * 3]


def test_every_table_is_there(small: Browser) -> None:
    for tab, said in (
        ("gemms", "GEMMs"),
        ("saved", "each of layers 0–2"),
        ("budget", "first moments"),
        ("schedule", "no schedule"),
        ("messages", "remark[R0001]: one"),
    ):
        small.click(f"[data-tab={tab}]")
        assert said in small.texts("#tables")[0], tab
    small.click("[data-tab=graph]")
    assert small.texts(LAYERS_BOX)


def test_names_from_user_code_are_text(browser: Browser, small_build: Path, tmp_path: Path) -> None:
    data = page_data(read_build(small_build))
    evil = "<img src=x onerror=\"document.title='owned'\"></script>"
    data["model"]["name"] = evil
    data["messages"] = [evil]
    data["paths"] = [p.replace("norm", evil.replace(".", "")) for p in data["paths"]]
    path = tmp_path / "evil.html"
    path.write_bytes(page(data))
    browser.open(path.as_uri())
    browser.click("[data-tab=messages]")
    assert evil in browser.texts("#tables")[0]
    browser.click("[data-tab=graph]")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.title") == f"fp8c: {evil}"
    assert browser.problems == []


def test_both_colour_schemes_have_readable_text(small: Browser) -> None:
    """WCAG contrast of 4.5 for text and badges on their backgrounds."""
    script = """(() => {
      const light = c => { const v = c / 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
      const channels = t => t.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const luminance = t => { const [r, g, b] = channels(t).map(light); return .2126 * r + .7152 * g + .0722 * b; };
      const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
      const behind = e => { while (e && /rgba\\(0, 0, 0, 0\\)/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement; return getComputedStyle(e).backgroundColor; };
      return [...document.querySelectorAll('.badge, .name, .type, .dim, dt, dd, .tabs button, kbd')].filter(e => e.offsetParent)
        .map(e => [e.className || e.tagName, ratio(getComputedStyle(e).color, behind(e))]).filter(([, r]) => r < 4.5);
    })()"""
    for is_dark in (False, True):
        small.dark(is_dark)
        assert small.evaluate(script) == []
    small.dark(False)


# --- the size of DeepSeek-V3 671B -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_of_a_671b_build(make_build: Callable[..., Path], tmp_path: Path) -> None:
    data = page_data(read_build(make_build(layers=61, extra=370)))
    assert sum(len(half["op"]) for half in data["halves"]) > 75_000
    content = page(data)
    assert len(content) < 5_000_000
    path = tmp_path / "large.html"
    path.write_bytes(content)
    with chromium() as browser:
        browser.open(path.as_uri())
        assert browser.busy_s() < 2.0  # a browser of its own: all it did was to load this page
        assert browser.evaluate("document.querySelectorAll('#graph .box').length") < 60

        times = []
        for target in ("fold:model.layers.0", "module:model.layers.0.attn", "module:model.layers.0.mlp"):
            selector = f'#forward [data-id="{target}"] .head'
            browser.evaluate(
                f"document.querySelector('{selector}').scrollIntoView({{block: 'center', inline: 'center'}})"
            )
            time.sleep(0.1)  # the page hears of the scrolling with its next frame
            browser.wait("document.body.dataset.prepared")
            before = browser.busy_s()
            browser.click(selector)
            times.append(browser.busy_s() - before)
        assert max(times) < 0.150, times

        before = browser.busy_s()
        browser.press("/")
        browser.type("scaled_mm dgrad")
        assert browser.texts("#results .result")
        assert browser.busy_s() - before < 1.0
        assert browser.problems == []
