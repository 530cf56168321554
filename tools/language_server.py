"""`fp8c spec lsp`: a language server for specs over stdin and stdout, on pygls (the extra `lsp`).

Mistakes as they are typed, what a selector matches in the model, what may stand at the cursor, where a name comes from,
and the one layout. The server itself never imports torch or a model: with `--model` another process finds the model's
operator uses once, and again when its file has changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsprotocol import types
from pygls import uris
from pygls.lsp.server import LanguageServer

from fp8c import __version__
from fp8c.backends.target import load_target
from fp8c.diagnostics import Diagnostic, DiagnosticError, Severity, Span
from fp8c.specs import vocabulary as vocab
from fp8c.specs.editing import Document, Model, use_from_json
from fp8c.specs.formatter import format_source
from fp8c.specs.parser import Source, source_of

_SEVERITIES = {
    Severity.ERROR: types.DiagnosticSeverity.Error,
    Severity.WARNING: types.DiagnosticSeverity.Warning,
    Severity.REMARK: types.DiagnosticSeverity.Information,
}


class SpecServer(LanguageServer):
    """model: the reference given with --model, "" for none;  arguments: what else its loading takes (`-a`, `--seq`)"""

    def __init__(self, model: str = "", target: str = "cpu", arguments: Sequence[str] = ()) -> None:
        super().__init__("fp8c", __version__)
        self.model_reference, self.target, self.arguments = model, target, tuple(arguments)
        self.known: Model | None = None
        self.documents: dict[str, Document] = {}

    def document(self, uri: str) -> Document:
        """The document as it stands, read again when its text or the model changed."""
        try:
            text = self.workspace.get_text_document(uri).source
        except (OSError, ValueError):  # closed meanwhile, and not on disk
            text = ""
        known = self.documents.get(uri)
        if known is None or known.source.text != text or known.model is not self.known:
            path = uris.to_fs_path(uri)
            root = Path(path).resolve().parent if path else None
            known = self.documents[uri] = Document(read_source(text, path or uri), root, self.known)
        return known

    def publish(self, uri: str) -> None:
        document = self.document(uri)
        shown = [self.diagnostic(uri, d) for d in document.diagnostics]
        self.text_document_publish_diagnostics(types.PublishDiagnosticsParams(uri, shown))

    def diagnostic(self, uri: str, found: Diagnostic) -> types.Diagnostic:
        span = found.span if found.span is None or self.is_here(uri, found.span) else None
        text = "\n".join([found.message, *found.notes, *([f"help: {found.help}"] if found.help else [])])
        related = [
            types.DiagnosticRelatedInformation(types.Location(uri, to_range(place)), label)
            for label, place in found.related
            if self.is_here(uri, place)
        ]
        if found.span is not None and span is None:
            text = f"{found.span}: {text}"
        return types.Diagnostic(
            to_range(span), text, _SEVERITIES[found.severity], found.code, source="fp8c", related_information=related
        )

    def is_here(self, uri: str, span: Span) -> bool:
        return span.file == self.document(uri).source.path

    def find_model(self) -> None:
        """Find the model's uses in another process, then look at every open document again."""
        try:
            self.known = model_uses(self.model_reference, self.target, self.arguments)
        except DiagnosticError as e:
            message = f"fp8c: {e.diagnostics[0].message}"
            self.window_show_message(types.ShowMessageParams(types.MessageType.Warning, message))
            return
        message = f"fp8c: {len(self.known.uses)} operator uses of {self.known.name}"
        self.window_log_message(types.LogMessageParams(types.MessageType.Info, message))
        for uri in list(self.documents):
            self.publish(uri)


def read_source(text: str, path: str) -> Source:
    """The text as a source, also where it is no text at all: the parser then says so."""
    try:
        return source_of(text, path)
    except DiagnosticError:
        return Source(path, path, text)


def to_range(span: Span | None) -> types.Range:
    """A place in the protocol's units: lines from 0, columns in UTF-16."""
    if span is None or not span.line:
        return types.Range(types.Position(0, 0), types.Position(0, 1))
    first = utf16(span.text[: max(0, span.column - 1)])
    last = utf16(span.text[: max(0, span.column - 1) + span.length])
    return types.Range(types.Position(span.line - 1, first), types.Position(span.line - 1, max(last, first + 1)))


def utf16(text: str) -> int:
    return sum(2 if ord(char) > 0xFFFF else 1 for char in text)


def to_column(line: str, character: int) -> int:
    """The column, from 1, of a UTF-16 offset; that of the character it cuts, and the line's end behind it."""
    units = 0
    for column, char in enumerate(line, 1):
        units += utf16(char)
        if units > character:
            return column
    return len(line) + 1


def model_uses(reference: str, target: str, arguments: Sequence[str]) -> Model:
    """The operator uses of a model, found by another process. Raises: DiagnosticError E0803 when it fails."""
    command = [sys.executable, "-m", "fp8c.tools.uses_json", reference, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DiagnosticError([Diagnostic("E0803", f"the model could not be read: {lines[0]}")])
    return Model(reference, tuple(use_from_json(item) for item in json.loads(done.stdout)), load_target(target))


def make_server(model: str = "", target: str = "cpu", arguments: Sequence[str] = ()) -> SpecServer:
    """The server with its features, not started yet."""
    server = SpecServer(model, target, arguments)

    @server.feature(types.INITIALIZED)
    def initialized(ls: SpecServer, params: types.InitializedParams) -> None:
        if ls.model_reference:
            threading.Thread(target=ls.find_model, daemon=True).start()

    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    def did_open(ls: SpecServer, params: types.DidOpenTextDocumentParams) -> None:
        ls.publish(params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    def did_change(ls: SpecServer, params: types.DidChangeTextDocumentParams) -> None:
        ls.publish(params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
    def did_close(ls: SpecServer, params: types.DidCloseTextDocumentParams) -> None:
        ls.documents.pop(params.text_document.uri, None)

    @server.feature(types.TEXT_DOCUMENT_DID_SAVE)
    def did_save(ls: SpecServer, params: types.DidSaveTextDocumentParams) -> None:
        if ls.model_reference:  # the model's file may have changed as well
            threading.Thread(target=ls.find_model, daemon=True).start()

    @server.feature(types.TEXT_DOCUMENT_HOVER)
    def hover(ls: SpecServer, params: types.HoverParams) -> types.Hover | None:
        document, line, column = _place(ls, params)
        found = document.hover(line, column)
        if found is None or not found.text:
            return None
        text = types.MarkupContent(types.MarkupKind.Markdown, found.text)
        return types.Hover(text, to_range(found.span) if found.span is not None else None)

    @server.feature(types.TEXT_DOCUMENT_DEFINITION)
    def definition(ls: SpecServer, params: types.DefinitionParams) -> types.Location | None:
        document, line, column = _place(ls, params)
        span = document.definition(line, column)
        if span is None:
            return None
        uri = params.text_document.uri if ls.is_here(params.text_document.uri, span) else uris.from_fs_path(_file(span))
        return types.Location(uri or params.text_document.uri, to_range(span))

    @server.feature(
        types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=["(", "@", "=", '"', ".", " "])
    )
    def completion(ls: SpecServer, params: types.CompletionParams) -> list[types.CompletionItem]:
        document, line, column = _place(ls, params)
        words = document.completions(line, column)
        return [
            types.CompletionItem(word, detail=vocab.MEANINGS.get(word), sort_text=f"{i:05}")
            for i, word in enumerate(words)
        ]

    @server.feature(types.TEXT_DOCUMENT_FORMATTING)
    def formatting(ls: SpecServer, params: types.DocumentFormattingParams) -> list[types.TextEdit]:
        source = ls.document(params.text_document.uri).source
        try:
            formatted = format_source(source)
        except DiagnosticError:
            return []  # what is wrong is shown already
        if formatted == source.text:
            return []
        lines = source.text.split("\n")
        end = types.Position(len(lines) - 1, utf16(lines[-1]))
        return [types.TextEdit(types.Range(types.Position(0, 0), end), formatted)]

    return server


def _place(ls: SpecServer, params: Any) -> tuple[Document, int, int]:
    document = ls.document(params.text_document.uri)
    line = int(params.position.line) + 1
    return document, line, to_column(document.source.line(line), int(params.position.character))


def _file(span: Span) -> str:
    """The file of a place: shipped specs are named without a folder."""
    from fp8c.specs.load import STD

    return str(Path(span.file) if Path(span.file).is_file() else STD / Path(span.file).name)


def serve(model: str = "", target: str = "cpu", arguments: Sequence[str] = ()) -> None:
    """Serve one editor until it closes stdin."""
    make_server(model, target, arguments).start_io()
