"""`fp8c spec lsp` as an editor meets it: a real client starts the command and talks to it over stdin and stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pygls")
from lsprotocol import types
from pygls.lsp.client import LanguageClient

from fp8c.specs.editing import use_from_json, use_json

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))
import role_records as models

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).parent / "models" / "tiny.py")
SPEC = """version 1;
use "std:deepseek_v3" as ds;
format act = e4m3 [1x128] scale fp32;
set ups = role(mlp_up);
spec mine extends ds {
  override rule late for @ups & layers(-1) {
    precision = bf16;
  }
}
"""


class Editor:
    """One open file in one editor."""

    def __init__(self, client: LanguageClient, path: Path) -> None:
        self.client, self.path, self.uri = client, path, path.as_uri()
        self.shown: list[types.PublishDiagnosticsParams] = []
        self.logged: list[str] = []
        client.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)(lambda params: self.shown.append(params))
        client.feature(types.WINDOW_LOG_MESSAGE)(lambda params: self.logged.append(params.message))
        client.feature(types.WINDOW_SHOW_MESSAGE)(lambda params: self.logged.append(params.message))

    async def open(self, text: str) -> list[types.Diagnostic]:
        self.text = text
        self.path.write_text(text)
        item = types.TextDocumentItem(self.uri, "fp8", 1, text)
        count = len(self.shown)
        self.client.text_document_did_open(types.DidOpenTextDocumentParams(item))
        return await self.next(count)

    async def change(self, text: str, version: int = 2) -> list[types.Diagnostic]:
        self.text = text
        count = len(self.shown)
        whole = types.TextDocumentContentChangeWholeDocument(text)
        identifier = types.VersionedTextDocumentIdentifier(version, self.uri)
        self.client.text_document_did_change(types.DidChangeTextDocumentParams(identifier, [whole]))
        return await self.next(count)

    async def next(self, count: int, seconds: float = 60) -> list[types.Diagnostic]:
        for _ in range(int(seconds * 100)):
            if len(self.shown) > count:
                return list(self.shown[-1].diagnostics)
            await asyncio.sleep(0.01)
        raise AssertionError("no diagnostics came")

    def at(self, text: str, offset: int = 1) -> dict[str, Any]:
        """The place `offset` characters into the first `text`."""
        before = self.text[: self.text.index(text) + offset]
        position = types.Position(before.count("\n"), len(before) - before.rfind("\n") - 1)
        return {"text_document": types.TextDocumentIdentifier(self.uri), "position": position}

    async def hover(self, text: str, offset: int = 1) -> str:
        found = await self.client.text_document_hover_async(types.HoverParams(**self.at(text, offset)))
        if found is None:
            return ""
        assert isinstance(found.contents, types.MarkupContent)
        return found.contents.value

    async def completions(self, text: str, offset: int) -> list[str]:
        found = await self.client.text_document_completion_async(types.CompletionParams(**self.at(text, offset)))
        assert isinstance(found, list)
        return [item.label for item in found]


def in_editor(tmp_path: Path, work: Callable[[Editor], Awaitable[None]], *arguments: str) -> None:
    async def session() -> None:
        client = LanguageClient("test", "1")
        await client.start_io(sys.executable, "-m", "fp8c", "spec", "lsp", *arguments, cwd=str(ROOT))
        editor = Editor(client, tmp_path / "mine.fp8")
        await client.initialize_async(types.InitializeParams(capabilities=types.ClientCapabilities()))
        client.initialized(types.InitializedParams())
        try:
            await work(editor)
        finally:
            await client.shutdown_async(None)
            client.exit(None)
            await client.stop()

    asyncio.run(asyncio.wait_for(session(), 120))


def test_mistakes_are_shown_where_they_are_and_go_away(tmp_path: Path) -> None:
    async def work(editor: Editor) -> None:
        assert await editor.open(SPEC) == []
        (found,) = await editor.change(SPEC.replace("role(mlp_up)", "role(mlp_pu)"))
        assert found.code == "E0101" and found.source == "fp8c" and "did you mean `mlp_up`" in found.message
        start = types.Position(3, len("set ups = role("))
        assert found.range == types.Range(start, types.Position(3, start.character + len("mlp_pu")))
        (found,) = await editor.change(SPEC.replace("ds.high", "").replace('"std:deepseek_v3"', '"std:deepsek_v3"'), 3)
        assert found.code == "E0603" and found.range.start.line == 1
        emoji = SPEC.replace("set ups", '# \U0001f600\nset a = "\U0001f600"; set ups').replace("role(", "rolle(")
        found = next(d for d in await editor.change(emoji, 4) if "rolle" in d.message)
        assert found.range.start.character == len('set a = "\U0001f600"; set ups = ') + 1, "columns are UTF-16"
        assert await editor.change("", 5) and await editor.change("\0{{", 6)
        assert await editor.change(SPEC, 7) == []

    in_editor(tmp_path, work)


def test_half_a_character_and_a_closed_document_are_answered(tmp_path: Path) -> None:
    """An edit may cut a surrogate pair; an answer may be asked for when the document is closed already."""

    async def work(editor: Editor) -> None:
        broken = SPEC.replace("set ups", 'set a = "\ud83d"; set ups').replace("role(", "rolle(")
        item = types.TextDocumentItem("untitled:Untitled-1", "fp8", 1, broken)
        editor.client.text_document_did_open(types.DidOpenTextDocumentParams(item))
        await editor.next(0)
        place = {
            "text_document": types.TextDocumentIdentifier(item.uri),
            "position": types.Position(3, len('set a = "?"; set ups = ro')),
        }
        assert await editor.client.text_document_completion_async(types.CompletionParams(**place)) is not None
        editor.client.text_document_did_close(types.DidCloseTextDocumentParams(place["text_document"]))
        assert await editor.client.text_document_hover_async(types.HoverParams(**place)) is None

    in_editor(tmp_path, work)


@pytest.mark.parametrize("character, column", [(0, 1), (1, 2), (2, 2), (3, 3), (4, 4), (99, 4)])
def test_columns_count_characters_and_editors_utf16(character: int, column: int) -> None:
    from fp8c.tools.language_server import to_column, utf16

    assert to_column("a\U0001f600b", character) == column
    assert utf16("a\U0001f600\ud83d") == 4


def test_hover_definition_completion_and_layout_without_a_model(tmp_path: Path) -> None:
    async def work(editor: Editor) -> None:
        await editor.open(SPEC.replace("format act = e4m3", "format   act=e4m3"))
        options = types.FormattingOptions(tab_size=2, insert_spaces=True)
        asked = types.DocumentFormattingParams(types.TextDocumentIdentifier(editor.uri), options)
        edits = await editor.client.text_document_formatting_async(asked)
        assert edits and edits[0].new_text.startswith('version 1;\nuse "std:deepseek_v3" as ds;\n')
        assert "format act = e4m3 [1x128] scale fp32;" in edits[0].new_text
        assert "Wins over plain rules" in await editor.hover("override")
        assert "no model is known" in await editor.hover("@ups", 2)
        assert "`act` is `e4m3[1x128] fp32`" in await editor.hover("act=", 1)
        place = await editor.client.text_document_definition_async(types.DefinitionParams(**editor.at("@ups", 2)))
        assert isinstance(place, types.Location) and place.range.start.line == 3

        async def offered(text: str, after: str) -> list[str]:
            await editor.change(text, len(text))
            return await editor.completions(after, len(after))

        rule = "version 1;\nformat act = e4m3 [1x128] scale fp32;\nset s = all;\nspec a {\n  rule r for "
        assert await offered("ver", "ver") == ["version", "use", "format", "set", "spec"]
        assert (await offered(rule, "for "))[:3] == ["op", "kind", "role"]
        assert "lm_head" in await offered(rule + "kind(", "kind(") and "router" in await offered(
            rule + "kind(l", "kind(l"
        )
        assert await offered(rule + "@", "@") == ["s"]
        assert (await offered(rule + "all { ", "all { "))[:2] == ["precision", "fprop"]
        assert "promote_every" in await offered(rule + "all { fprop { ", "fprop { ")
        assert (await offered(rule + "all { fprop { x = ", "x = "))[0] == "act"
        assert await offered(rule + "all { fprop { accumulate = ", "late = ") == ["fp32"]
        assert await offered("version 1; spec a { schedule { pipeline = ", "line = ") == [
            *("none", "1f1b", "zerobubble", "dualpipe", "dualpipev")
        ]
        assert "std:deepseek_v3" in await offered('version 1;\nuse "', 'use "')
        assert "1x128" in await offered("version 1; format f = e4m3 [", "e4m3 [")
        assert await offered("version 1; # rule r for ", "for ") == []

    in_editor(tmp_path, work)


def test_hover_says_what_a_selector_matches_in_the_model(tmp_path: Path) -> None:
    async def work(editor: Editor) -> None:
        count = len(editor.shown)
        await editor.open(SPEC)
        for _ in range(9000):
            if any("operator uses" in line for line in editor.logged):
                break
            await asyncio.sleep(0.01)
        assert "12 operator uses" in " ".join(editor.logged), editor.logged
        found = await editor.next(count + 1)
        assert found == []
        text = await editor.hover("@ups", 2)
        assert "matches 4 of 12 uses" in text and "- `layers.0.gate`" in text
        assert "matches 2 of 12 uses" in await editor.hover("rule late", 6)
        assert "matches 5 of 12 uses" in await editor.hover("layers(-1)", 2)
        wrong = await editor.change(SPEC.replace("layers(-1)", "layers(7)"))
        assert [d.code for d in wrong] == ["E0302"] and wrong[0].range.start.line == 5
        path = SPEC.replace("@ups", '"')
        await editor.change(path, 3)
        assert "layers.1.down" in await editor.completions('for "', 5)

    in_editor(tmp_path, work, "--model", TINY)


def test_role_records_travel_as_json() -> None:
    for use in models.deepseek(layers=2, dense=1):
        assert use_from_json(json.loads(json.dumps(use_json(use)))) == use
