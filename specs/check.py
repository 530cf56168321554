"""Statements -> syntax tree: every word is judged here, with all that is known about the place where it stands.

Mistakes are collected per statement, so one run reports them all. What needs other files (names of formats and sets,
`extends`) is checked in `load.py`; what needs a model, in `resolve.py`. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span
from fp8c.formats import MAX, WHOLE, Delayed, Element, Format, Rounding, ScaleKind
from fp8c.specs import ast, globs
from fp8c.specs import vocabulary as vocab
from fp8c.specs.parser import Bracket, Piece, Source, Statement, Token, parse
from fp8c.specs.vocabulary import FormatValue, Integer, Type, Words, did_you_mean

MAX_DIGITS = 9  # of an integer: more is no size of anything here, and Python refuses to read 4301 digits
MAX_GROUP = 1 << 16
MAX_DIAGNOSTICS = 100  # of one file: who reads more


def check(source: Source) -> ast.File:
    """Parse and check one file. Raises DiagnosticError with every mistake found (exit code SPEC)."""
    checker = _Checker(source)
    file = checker.file(parse(source))
    if checker.diagnostics:
        raise DiagnosticError(checker.diagnostics[:MAX_DIAGNOSTICS], ExitCode.SPEC)
    return file


class _Mistake(Exception):
    """Ends the statement that is being checked; the next one is checked all the same."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        self.diagnostic = diagnostic


class _Cursor:
    """Reads the pieces of one statement from left to right."""

    def __init__(self, source: Source, pieces: tuple[Piece, ...], end: Token) -> None:
        self.source, self.pieces, self.end = source, pieces, end
        self.at = 0

    @property
    def piece(self) -> Piece | None:
        return self.pieces[self.at] if self.at < len(self.pieces) else None

    @property
    def text(self) -> str:
        """The next word or mark, "(" or "[" for a bracket, "" at the end; strings give "" too."""
        piece = self.piece
        return "" if piece is None or piece.kind in ("STRING", "REGEX") else piece.text

    @property
    def kind(self) -> str:
        return self.piece.kind if self.piece is not None else ""

    def fail(self, message: str, *, code: str = "E0101", at: Piece | None = None, help: str = "") -> NoReturn:
        raise _Mistake(Diagnostic(code, message, self.span(at or self.piece or self.end), help=help))

    def span(self, first: Piece, last: Piece | None = None) -> Span:
        return self.source.span(first.first, (last or first).last)

    def since(self, start: int) -> Span:
        """From the piece at index `start` to the piece read last."""
        return self.span(self.pieces[start], self.pieces[max(start, self.at - 1)])

    def found(self) -> str:
        piece = self.piece
        if piece is None:
            return f"found `{self.end.text}`"
        return f"found {piece.text}" if piece.kind == "STRING" else f"found `{piece.text}`"

    def take(self, kind: str, phrase: str, help: str = "") -> Token:
        piece = self.piece
        if not isinstance(piece, Token) or piece.kind != kind:
            self.fail(f"expected {phrase}, {self.found()}", help=help)
        self.at += 1
        return piece

    def accept(self, text: str) -> bool:
        if self.text != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            help = did_you_mean(self.text, [text]) if self.kind == "WORD" else ""
            self.fail(f"expected `{text}`, {self.found()}", help=help)

    def bracket(self, mark: str, phrase: str) -> _Cursor:
        piece = self.piece
        if not isinstance(piece, Bracket) or piece.text != mark:
            self.fail(f"expected {phrase}, {self.found()}")
        self.at += 1
        return _Cursor(self.source, piece.pieces, piece.last)

    def choice(self, choices: Iterable[str], phrase: str) -> Token:
        """One word of a closed list."""
        if self.kind != "WORD":
            self.fail(f"expected {phrase}, {self.found()}", help=did_you_mean("", choices))
        if self.text not in choices:
            self.fail(
                f"unknown {phrase.removeprefix('a ').removeprefix('an ')} `{self.text}`",
                help=did_you_mean(self.text, choices),
            )
        return self.take("WORD", phrase)

    def integer(self, phrase: str, least: int, most: int) -> int:
        token = self.take("INTEGER", phrase)
        if len(token.text.lstrip("-")) > MAX_DIGITS:
            self.at -= 1
            self.fail(f"the number has more than {MAX_DIGITS} digits", code="E0104")
        value = int(token.text)
        if not least <= value <= most:
            self.at -= 1
            self.fail(f"{phrase.removeprefix('an integer ')} is {value}; it must be from {least} to {most}")
        return value

    def string(self, phrase: str) -> tuple[str, Token]:
        token = self.take("STRING", phrase)
        return unquote(token.text), token

    def done(self) -> None:
        piece = self.piece
        if piece is None:
            return
        before = self.pieces[self.at - 1].last if self.at else None
        if before is not None and piece.first.line > before.line and self.end.text in (";", "{"):
            # A new line begins with what cannot go on: it is the end of the line above that is missing.
            line = self.source.line(before.line)
            place = Span(self.source.path, before.line, before.column + len(before.text), 1, line + " ")
            raise _Mistake(Diagnostic("E0101", f"expected `;` after `{before.text}`", place))
        self.fail(f"expected `{self.end.text}`, {self.found()}")


def unquote(text: str) -> str:
    r"""The text of a string: \" and \\ are the only escapes, any other backslash stands for itself."""
    return text[1:-1].replace('\\"', '"').replace("\\\\", "\\")


def _doc(statement: Statement) -> str:
    return "\n".join(d.text[2:].strip() for d in statement.docs)


class _Checker:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.diagnostics: list[Diagnostic] = []

    def report(
        self, code: str, message: str, span: Span, help: str = "", related: tuple[tuple[str, Span], ...] = ()
    ) -> None:
        self.diagnostics.append(Diagnostic(code, message, span, help=help, related=related))

    def each(self, statements: tuple[Statement, ...], check_one: Callable[[Statement], None]) -> None:
        for statement in statements:
            try:
                check_one(statement)
            except _Mistake as mistake:
                self.diagnostics.append(mistake.diagnostic)

    def cursor(self, statement: Statement) -> _Cursor:
        return _Cursor(self.source, statement.pieces, statement.stop)

    def needs_semicolon(self, statement: Statement) -> None:
        if statement.block is not None:
            self.cursor(statement).fail(
                f"`{statement.first.text}` takes no block: expected `;`", at=statement.pieces[-1].last
            )

    def needs_block(self, statement: Statement) -> tuple[Statement, ...]:
        if statement.block is None:
            cursor = self.cursor(statement)
            cursor.fail(f"`{statement.first.text}` needs a block: expected `{{`, found `;`", at=statement.stop)
        return statement.block

    def unknown(self, statement: Statement, choices: Iterable[str], where: str) -> NoReturn:
        first = statement.pieces[0]
        cursor = self.cursor(statement)
        if first.kind != "WORD":
            cursor.fail(f"expected a word that begins a statement, {cursor.found()}", at=first)
        help = did_you_mean(first.text, choices)
        cursor.fail(f"unknown word `{first.text}` {where}", at=first, help=help)

    # -- files ---------------------------------------------------------------------------------------------------------

    def file(self, statements: tuple[Statement, ...]) -> ast.File:
        uses: list[ast.Use] = []
        formats: list[ast.NamedFormat] = []
        sets: list[ast.NamedSet] = []
        specs: list[ast.SpecDecl] = []

        def one(statement: Statement) -> None:
            cursor = self.cursor(statement)
            word = cursor.text if cursor.kind == "WORD" else ""
            if word in ("use", "format", "set", "version"):
                self.needs_semicolon(statement)
            if word == "version":
                cursor.fail("`version` is the first statement of a file", at=statement.first)
            elif word == "use":
                uses.append(self.use(cursor))
            elif word == "format":
                formats.append(self.named_format(cursor, _doc(statement)))
            elif word == "set":
                sets.append(self.named_set(cursor, _doc(statement)))
            elif word == "spec":
                specs.append(self.spec(statement))
            elif word in vocab.SPEC_STATEMENTS or word in vocab.MODIFIERS:
                cursor.fail(f"`{word}` stands inside `spec NAME {{ ... }}`", at=statement.first)
            else:
                self.unknown(statement, vocab.TOP_LEVEL, "at the top of a file")

        has_version = self.version(statements)
        self.each(statements[1:] if has_version else statements, one)
        self.once([(f.name, f.span) for f in formats], "format")
        self.once([(s.name, s.span) for s in sets], "set")
        self.once([(u.alias, u.span) for u in uses], "alias")
        for spec in specs[1:]:
            self.report(
                "E0206",
                f"a file holds one spec, and this is another: `{spec.name}`",
                spec.span,
                help="put it in a file of its own and share formats and sets with `use`",
                related=(("the first", specs[0].span),),
            )
        return ast.File(
            self.source.name, self.source.path, tuple(uses), tuple(formats), tuple(sets), specs[0] if specs else None
        )

    def version(self, statements: tuple[Statement, ...]) -> bool:
        """Check `version 1;`. The result says whether the first statement is meant to be that, well-formed or not."""
        if not statements:
            help = f"begin with `version {vocab.VERSION};`"
            self.report("E0602", "the file is empty", Span(self.source.path, 1), help=help)
            return True
        cursor = self.cursor(statements[0])
        is_version = cursor.kind == "WORD" and vocab.nearest(cursor.text, vocab.TOP_LEVEL) == "version"
        try:
            if not cursor.accept("version"):
                help = "did you mean `version`?" if is_version else f"write `version {vocab.VERSION};` above it"
                cursor.fail("a spec begins with its language version", code="E0602", at=statements[0].first, help=help)
            number = cursor.integer("an integer version", 0, 10**9)
            if number != vocab.VERSION:
                cursor.at -= 1
                cursor.fail(
                    f"this is language version {number}; this fp8c reads version {vocab.VERSION}",
                    code="E0602",
                    help="install the fp8c that the spec was written for" if number > vocab.VERSION else "",
                )
            cursor.done()
            self.needs_semicolon(statements[0])
        except _Mistake as mistake:
            self.diagnostics.append(mistake.diagnostic)
        return is_version

    def once(self, named: list[tuple[str, Span]], what: str) -> None:
        seen: dict[str, Span] = {}
        for name, span in named:
            if name in seen:
                self.report("E0201", f"{what} `{name}` is defined twice", span, related=(("the first", seen[name]),))
            seen.setdefault(name, span)

    def use(self, cursor: _Cursor) -> ast.Use:
        cursor.expect("use")
        file, token = cursor.string('a file, as in `use "std:deepseek_v3" as ds;`')
        if cursor.piece is None:
            stem = file.removeprefix("std:").rsplit("/", 1)[-1].removesuffix(".fp8")
            if not stem.isidentifier():
                cursor.fail(f"the name `{stem}` cannot be written in a spec", at=token, help="add `as NAME`")
            return ast.Use(file, stem, cursor.span(token))
        cursor.expect("as")
        alias = cursor.take("WORD", "a name after `as`")
        cursor.done()
        return ast.Use(file, alias.text, cursor.span(token))

    def named_format(self, cursor: _Cursor, doc: str) -> ast.NamedFormat:
        cursor.expect("format")
        name = cursor.take("WORD", "the format's name")
        if name.text in vocab.ELEMENTS or name.text == "off":
            cursor.fail(f"`{name.text}` is a word of the language and cannot name a format", at=name)
        cursor.expect("=")
        value = self.format(cursor)
        cursor.done()
        return ast.NamedFormat(name.text, value, cursor.span(name), doc)

    def named_set(self, cursor: _Cursor, doc: str) -> ast.NamedSet:
        cursor.expect("set")
        name = cursor.take("WORD", "the set's name")
        cursor.expect("=")
        selector = self.selector(cursor)
        cursor.done()
        return ast.NamedSet(name.text, selector, cursor.span(name), doc)

    # -- the spec ------------------------------------------------------------------------------------------------------

    def spec(self, statement: Statement) -> ast.SpecDecl:
        cursor = self.cursor(statement)
        cursor.expect("spec")
        name = cursor.take("WORD", "the spec's name")
        extends, extends_span = "", None
        if cursor.piece is not None:
            cursor.expect("extends")
            parent = cursor.take("WORD", "the alias of a used file after `extends`")
            extends, extends_span = parent.text, cursor.span(parent)
            if cursor.text == ".":
                cursor.fail(
                    f"a file holds one spec: write `extends {parent.text}`", help=f"delete from `.` on: `{parent.text}`"
                )
        cursor.done()
        targets: list[ast.Target] = []
        rules: list[ast.Rule] = []
        sections: list[ast.Section] = []
        expects: list[ast.Expect] = []

        def one(item: Statement) -> None:
            cursor = self.cursor(item)
            modifiers = self.modifiers(cursor)
            word = cursor.text if cursor.kind == "WORD" else ""
            if modifiers != ast.Modifiers() and word in ("target", "expect"):
                cursor.fail(f"`{item.first.text}` does not go with `{word}`", at=item.first)
            if word == "target":
                self.needs_semicolon(item)
                targets.append(self.target(cursor))
            elif word == "rule":
                rules.append(self.rule(item, cursor, modifiers))
            elif word == "expect":
                self.needs_semicolon(item)
                expects.append(self.expectation(cursor))
            elif word in vocab.SECTIONS:
                sections.append(self.section(item, cursor, modifiers))
            elif word in ("format", "set", "use"):
                cursor.fail(f"`{word}` stands above the spec, not inside it", at=item.first)
            elif cursor.at:
                help = did_you_mean(word, vocab.SPEC_STATEMENTS)
                cursor.fail(f"expected `rule` or a section after a modifier, {cursor.found()}", help=help)
            else:
                self.unknown(item, (*vocab.SPEC_STATEMENTS, *vocab.MODIFIERS), "in a spec")

        self.each(self.needs_block(statement), one)
        for target in targets[1:]:
            self.report(
                "E0201", "a spec has one `target` statement", target.span, related=(("the first", targets[0].span),)
            )
        self.once([(r.name, r.span) for r in rules], "rule")
        self.once([(s.name, s.span) for s in sections], "section")
        return ast.SpecDecl(
            name.text,
            extends,
            extends_span,
            targets[0] if targets else None,
            tuple(rules),
            tuple(sections),
            tuple(expects),
            _doc(statement),
            cursor.span(name),
        )

    def modifiers(self, cursor: _Cursor) -> ast.Modifiers:
        given: list[str] = []
        while cursor.kind == "WORD" and cursor.text in vocab.MODIFIERS:
            if cursor.text in given:
                cursor.fail(f"`{cursor.text}` is written twice")
            given.append(cursor.text)
            cursor.at += 1
        return ast.Modifiers(**{word: True for word in given})

    def target(self, cursor: _Cursor) -> ast.Target:
        start = cursor.at
        cursor.expect("target")
        names: list[ast.Alternative] = []
        while True:
            token = cursor.choice(vocab.ARCHITECTURES, "an architecture")
            names.append(ast.Alternative(token.text, cursor.span(token)))
            if not cursor.accept(","):
                break
        span = cursor.since(start)
        requires = None
        if cursor.piece is not None:
            cursor.expect("requires")
            requires = self.condition(cursor)
        cursor.done()
        return ast.Target(tuple(names), requires, span)

    def expectation(self, cursor: _Cursor) -> ast.Expect:
        start = cursor.at
        cursor.expect("expect")
        selector = self.selector(cursor)
        cursor.expect("matches")
        compare = self.comparison(cursor)
        count = cursor.integer("an integer count", 0, 10**9)
        cursor.done()
        return ast.Expect(selector, compare, count, cursor.since(start))

    def comparison(self, cursor: _Cursor) -> str:
        if cursor.text not in vocab.COMPARISONS:
            help = "write `==`" if cursor.text == "=" else ""
            cursor.fail(f"expected a comparison such as `>=`, {cursor.found()}", help=help)
        text = cursor.text
        cursor.at += 1
        return text

    # -- rules and sections --------------------------------------------------------------------------------------------

    def rule(self, statement: Statement, cursor: _Cursor, modifiers: ast.Modifiers) -> ast.Rule:
        cursor.expect("rule")
        name = cursor.take("WORD", "the rule's name")
        selector: ast.Selector = ast.All(cursor.span(name))
        try:
            cursor.expect("for")
            selector = self.selector(cursor)
            cursor.done()
        except _Mistake as mistake:  # what the rule says is checked all the same
            self.diagnostics.append(mistake.diagnostic)
        fields: list[ast.Field] = []
        because: list[str] = []

        def one(inner: Statement) -> None:
            cursor = self.cursor(inner)
            word = cursor.text if cursor.kind == "WORD" else ""
            if word in vocab.GEMM_FIELDS and inner.block is not None:
                cursor.at += 1
                cursor.done()
                self.each(inner.block, lambda s: fields.append(self.gemm_field(s, word)))
                return
            if word not in vocab.RULE_STATEMENTS:
                self.unknown(inner, vocab.RULE_STATEMENTS, "in a rule")
            if word in vocab.GEMM_FIELDS and len(inner.pieces) == 1:
                cursor.fail(f"`{word}` needs a block: expected `{{`, found `;`", at=inner.stop)
            self.needs_semicolon(inner)
            cursor.at += 1
            if word in vocab.GEMM_FIELDS:
                cursor.expect(".")
                fields.append(self.assignment(cursor, vocab.GEMM_FIELDS[word], f"`{word}`", f"{word}."))
            elif word == "precision":
                cursor.at -= 1
                fields.append(self.assignment(cursor, {"precision": FormatValue(plain=True)}, "a rule", ""))
            elif word == "cache":
                fields.extend(self.cache(cursor))
            elif word == "recompute":
                fields.extend(self.recompute(cursor))
            else:
                because.append(self.because(cursor))

        self.each(self.needs_block(statement), one)
        if not fields and not self.diagnostics:
            self.report("E0207", f"rule `{name.text}` decides nothing", cursor.span(name))
        self.fields_once(fields)
        return ast.Rule(
            name.text, modifiers, selector, tuple(fields), " ".join(because), _doc(statement), cursor.span(name)
        )

    def fields_once(self, fields: list[ast.Field]) -> None:
        seen: dict[str, ast.Field] = {}
        for field in fields:
            if field.name in seen:
                self.report(
                    "E0201",
                    f"`{field.name}` is given twice",
                    field.span,
                    related=(("the first", seen[field.name].span),),
                )
            seen.setdefault(field.name, field)

    def section(self, statement: Statement, cursor: _Cursor, modifiers: ast.Modifiers) -> ast.Section:
        token = cursor.take("WORD", "a section")
        if modifiers.optional:
            cursor.fail("`optional` goes with rules: a section always applies", at=statement.first)
        cursor.done()
        types = vocab.SECTIONS[token.text]
        fields: list[ast.Field] = []
        because: list[str] = []

        def one(inner: Statement) -> None:
            self.needs_semicolon(inner)
            cursor = self.cursor(inner)
            if cursor.text == "because" and cursor.kind == "WORD":
                cursor.at += 1
                because.append(self.because(cursor))
                return
            fields.append(self.assignment(cursor, types, f"section `{token.text}`", ""))

        if statement.block is None:
            cursor.fail(f"section `{token.text}` needs a block: expected `{{`, found `;`", at=statement.stop)
        self.each(statement.block, one)
        self.fields_once(fields)
        return ast.Section(token.text, modifiers, tuple(fields), " ".join(because), _doc(statement), cursor.span(token))

    def because(self, cursor: _Cursor) -> str:
        text, _ = cursor.string("the reason as a string")
        cursor.done()
        return text

    def gemm_field(self, statement: Statement, gemm: str) -> ast.Field:
        self.needs_semicolon(statement)
        return self.assignment(self.cursor(statement), vocab.GEMM_FIELDS[gemm], f"`{gemm}`", f"{gemm}.")

    def assignment(self, cursor: _Cursor, types: dict[str, Type], where: str, prefix: str) -> ast.Field:
        """`name = value`, where `types` says which names there are and what each takes."""
        if cursor.kind != "WORD" or cursor.text not in types:
            help = did_you_mean(cursor.text, types) if cursor.kind == "WORD" else did_you_mean("", types)
            found = f"{where} has no `{cursor.text}`" if cursor.kind == "WORD" else f"expected a name, {cursor.found()}"
            cursor.fail(found, help=help)
        name = cursor.take("WORD", "a name").text
        cursor.expect("=")
        start = cursor.at
        value = self.value(cursor, types[name], name)
        span = cursor.since(start)
        cursor.done()
        return ast.Field(prefix + name, value, span)

    def value(self, cursor: _Cursor, type_: Type, name: str) -> ast.Value:
        match type_:
            case Integer(least, most):
                return cursor.integer(f"an integer {name}", least, most)
            case Words(choices):
                return cursor.choice(choices, f"a value for {name}").text
            case FormatValue(plain, or_off):
                if or_off and cursor.kind == "WORD" and cursor.accept("off"):
                    return "off"
                start = cursor.at
                value = self.format(cursor)
                if plain and isinstance(value, Format) and value.is_quantized:
                    cursor.at = start
                    cursor.fail(
                        f"`{name}` is kept without scales: it cannot be {value.element.value}",
                        code="E0404",
                        help="write `bf16`, `fp16` or `fp32`",
                    )
                return value

    def cache(self, cursor: _Cursor) -> list[ast.Field]:
        name = cursor.choice(vocab.CACHED_VALUES, "a cached value").text
        start = cursor.at
        if cursor.kind == "WORD" and cursor.accept("off"):
            field = ast.Field(f"cache.{name}", "off", cursor.since(start))
            cursor.done()
            return [field]
        if cursor.kind == "WORD" and cursor.text != "as":
            cursor.fail(f"expected `as` or `off`, {cursor.found()}", help=did_you_mean(cursor.text, ["as", "off"]))
        cursor.expect("as")
        start = cursor.at
        fields = [ast.Field(f"cache.{name}", self.format(cursor), cursor.since(start))]
        if cursor.piece is not None:
            start = cursor.at
            cursor.expect("retile")
            _, text = self.group(cursor)
            exact = cursor.accept("exact") if cursor.kind == "WORD" else False
            cursor.done()
            fields.append(ast.Field(f"retile.{name}", (text, exact), cursor.since(start)))
        return fields

    def recompute(self, cursor: _Cursor) -> list[ast.Field]:
        fields: list[ast.Field] = []
        while True:
            token = cursor.choice(vocab.RECOMPUTED_VALUES, "a recomputed value")
            fields.append(ast.Field(f"recompute.{token.text}", True, cursor.span(token)))
            if not cursor.accept(","):
                break
        cursor.done()
        return fields

    # -- formats -------------------------------------------------------------------------------------------------------

    def format(self, cursor: _Cursor) -> Format | ast.FormatRef:
        start = cursor.at
        if cursor.kind != "WORD":
            cursor.fail(
                f"expected a format, {cursor.found()}",
                help="write for example `e4m3 [1x128] scale fp32 online`, or a format's name",
            )
        word = cursor.text
        if word in vocab.ELEMENTS:
            return self.literal_format(cursor)
        cursor.at += 1
        if cursor.text == "." and cursor.kind == "MARK":
            cursor.at += 1
            part = cursor.take("WORD", f"a format's name after `{word}.`")
            return ast.FormatRef(f"{word}.{part.text}", cursor.since(start))
        if cursor.text in ("[", "scale"):  # only an element is followed by these
            cursor.at -= 1
            cursor.fail(f"unknown element `{word}`", help=did_you_mean(word, vocab.ELEMENTS))
        return ast.FormatRef(word, cursor.since(start))

    def literal_format(self, cursor: _Cursor) -> Format:
        element = Element(cursor.take("WORD", "an element").text)
        if element not in MAX:
            if cursor.text == "[" or cursor.text == "scale":
                cursor.fail(f"`{element.value}` is not quantized: it takes no group and no scale")
            return Format(element)
        if cursor.text != "[":
            cursor.fail(
                f"`{element.value}` needs a group, {cursor.found()}",
                help=f"write for example `{element.value} [1x128] scale fp32 online`",
            )
        group, _ = self.group(cursor)
        if not (cursor.kind == "WORD" and cursor.accept("scale")):
            close = vocab.nearest(cursor.text, ["scale"]) if cursor.kind == "WORD" else ""
            help = "did you mean `scale`?" if close else "write `scale fp32`, `scale pow2` or `scale e8m0`"
            cursor.fail(f"expected `scale`, {cursor.found()}", help=help)
        scale = ScaleKind(cursor.choice(vocab.SCALES, "a scale kind").text)
        rounding: Rounding | None = None
        delayed: Delayed | None = None
        timed = False
        while cursor.kind == "WORD" and cursor.text not in ("retile",):
            if cursor.text in vocab.ROUNDINGS and rounding is None:
                rounding = Rounding(cursor.take("WORD", "a rounding").text)
            elif cursor.text in ("online", "delayed") and not timed:
                timed = True
                if cursor.take("WORD", "`online`").text == "delayed":
                    delayed = self.delayed(cursor.bracket("(", "`(` after `delayed`"))
            else:
                choices = ("online", "delayed", *vocab.ROUNDINGS)
                cursor.fail(f"unexpected word `{cursor.text}` in a format", help=did_you_mean(cursor.text, choices))
        return Format(element, group, scale, rounding or Rounding.RNE, delayed)

    def group(self, cursor: _Cursor) -> tuple[tuple[int, int], str]:
        """`[1x128]`, `[row]`, `[col]` or `[tensor]` -> the group and its text."""
        inside = cursor.bracket("[", "a group such as `[1x128]`")
        example = "write `[1x128]`, `[row]`, `[col]` or `[tensor]`"
        piece = inside.piece
        if piece is None or piece.kind not in ("GROUP", "WORD"):
            inside.fail(f"expected a group such as `1x128`, {inside.found()}", help=example)
        if piece.kind == "WORD":
            word = inside.choice(vocab.GROUP_WORDS, "a group").text
            inside.done()
            return {"row": (1, WHOLE), "col": (WHOLE, 1), "tensor": (WHOLE, WHOLE)}[word], word
        rows, cols = (part.lstrip("0") or "0" for part in piece.text.split("x"))
        if not all(len(part) <= MAX_DIGITS and 1 <= int(part) <= MAX_GROUP for part in (rows, cols)):
            inside.fail(f"each side of a group is from 1 to {MAX_GROUP}", help=example)
        inside.at += 1
        inside.done()
        return (int(rows), int(cols)), f"{rows}x{cols}"

    def delayed(self, inside: _Cursor) -> Delayed:
        given: dict[str, int | str] = {}
        types: dict[str, Type] = {
            "history": Integer(1, 1 << 20),
            "algo": Words(vocab.DELAYED_ALGORITHMS),
            "margin": Integer(0, 64),
        }
        while inside.piece is not None:
            token = inside.choice(types, "a setting of `delayed`")
            if token.text in given:
                inside.fail(f"`{token.text}` is given twice", at=token)
            inside.expect("=")
            value = self.value(inside, types[token.text], token.text)
            assert isinstance(value, (int, str))
            given[token.text] = value
            if not inside.accept(","):
                break
        inside.done()
        return Delayed(**given)  # type: ignore[arg-type]

    # -- selectors -----------------------------------------------------------------------------------------------------

    def selector(self, cursor: _Cursor) -> ast.Selector:
        """`a | b & !c`; `&` binds tighter than `|`, brackets as usual."""
        start = cursor.at
        branches: list[ast.Selector] = []
        while True:
            first = cursor.at
            parts = [self.negation(cursor)]
            while cursor.accept("&"):
                parts.append(self.negation(cursor))
            branches.append(parts[0] if len(parts) == 1 else ast.And(tuple(parts), cursor.since(first)))
            if not cursor.accept("|"):
                break
        if cursor.kind == "WORD" and cursor.text in ("and", "or", "not"):
            cursor.fail(f"expected `&`, `|` or `!`, found `{cursor.text}`")
        return branches[0] if len(branches) == 1 else ast.Or(tuple(branches), cursor.since(start))

    def negation(self, cursor: _Cursor) -> ast.Selector:
        start = cursor.at
        while cursor.accept("!"):
            pass
        is_negated = (cursor.at - start) % 2 == 1
        atom = self.atom(cursor)
        return ast.Not(atom, cursor.since(start)) if is_negated else atom

    def atom(self, cursor: _Cursor) -> ast.Selector:
        start = cursor.at
        piece = cursor.piece
        if isinstance(piece, Bracket) and piece.text == "(":
            inside = cursor.bracket("(", "`(`")
            selector = self.selector(inside)
            inside.done()
            return selector
        if cursor.kind == "STRING":
            return self.glob(cursor, "path")
        if cursor.kind == "REGEX":
            token = cursor.take("REGEX", "a regular expression")
            pattern = token.text[1:-1].replace("\\/", "/")
            problem = globs.regex_problem(pattern)
            if problem:
                cursor.fail(f"not a regular expression: {problem}", code="E0106", at=token)
            maybe = cursor.accept("?")
            span = cursor.span(token)
            return ast.Regex(ast.Alternative(pattern, span, maybe), span)
        if cursor.accept("@"):
            name = cursor.take("WORD", "the set's name after `@`").text
            if cursor.accept("."):
                name += "." + cursor.take("WORD", f"the set's name after `{name}.`").text
            return ast.SetRef(name, cursor.since(start))
        if cursor.kind != "WORD":
            cursor.fail(
                f"expected a selector, {cursor.found()}",
                help='write for example `op(linear)`, `kind(router)`, `layers(0..2)`, `@set` or `"path.*"`',
            )
        if cursor.text == "all":
            cursor.at += 1
            return ast.All(cursor.since(start))
        word = cursor.text
        if word not in vocab.PREDICATES:
            help = did_you_mean(word, (*vocab.PREDICATES, "all"))
            cursor.fail(f"unknown selector `{word}`", help=help)
        cursor.at += 1
        inside = cursor.bracket("(", f"`(` after `{word}`")
        selector = self.predicate(word, inside, cursor, start)
        inside.done()
        return selector

    def predicate(self, word: str, inside: _Cursor, cursor: _Cursor, start: int) -> ast.Selector:
        """What stands in the brackets of `word(...)`; a `?` after the bracket holds for every value in it."""
        maybe = cursor.accept("?")
        span = cursor.since(start)
        if inside.piece is None:
            inside.fail(f"`{word}()` needs a value")
        if word == "shape":
            return ast.Shape(self.condition(inside), span, maybe)
        if word == "param":
            glob = self.glob(inside, "param")
            return ast.Glob(
                "param", ast.Alternative(glob.pattern.text, glob.pattern.span, glob.pattern.maybe or maybe), span
            )
        if word == "layers":
            ranges: list[ast.LayerRange] = []
            while True:
                ranges.append(self.layer_range(inside, maybe))
                if not inside.accept(","):
                    return ast.Layers(tuple(ranges), span)
        known = vocab.PREDICATE_VALUES[word]
        values: list[ast.Alternative] = []
        while True:
            token = inside.choice(known, f"a {word}")
            values.append(ast.Alternative(token.text, inside.span(token), inside.accept("?") or maybe))
            if not inside.accept(","):
                return ast.Among(word, tuple(values), span)

    def layer_range(self, inside: _Cursor, maybe: bool) -> ast.LayerRange:
        start = inside.at
        first = last = inside.integer("an integer layer", -(10**6), 10**6)
        if inside.accept(".."):
            last = inside.integer("an integer layer", -(10**6), 10**6)
        if (first < 0) == (last < 0) and last < first:
            inside.at = start
            inside.fail(f"the range {first}..{last} is empty", help=f"write `{last}..{first}`")
        span = inside.since(start)
        return ast.LayerRange(first, last, span, inside.accept("?") or maybe)

    def glob(self, cursor: _Cursor, of: str) -> ast.Glob:
        text, token = cursor.string("a pattern as a string")
        try:
            globs.expand(text)
        except globs.BadGlob as e:
            place = Span(
                self.source.path,
                token.line,
                token.column + 1 + min(e.offset, max(0, len(token.text) - 2)),
                1,
                self.source.line(token.line),
            )
            raise _Mistake(Diagnostic("E0106", f"not a path pattern: {e}", place, help=e.help)) from None
        maybe = cursor.accept("?")
        span = cursor.span(token)
        return ast.Glob(of, ast.Alternative(text, span, maybe), span)

    def condition(self, cursor: _Cursor) -> ast.Condition:
        start = cursor.at
        any_of: list[tuple[ast.Term, ...]] = []
        while True:
            all_of = [self.term(cursor)]
            while cursor.accept("and"):
                all_of.append(self.term(cursor))
            any_of.append(tuple(all_of))
            if not cursor.accept("or"):
                return ast.Condition(tuple(any_of), cursor.since(start))

    def term(self, cursor: _Cursor) -> ast.Term:
        start = cursor.at
        variable = cursor.choice(vocab.SHAPE_VARIABLES, "a size").text
        modulo = cursor.integer("an integer divisor", 1, 10**9) if cursor.accept("%") else 0
        compare = self.comparison(cursor)
        number = cursor.integer("an integer size", 0, 10**9)
        return ast.Term(variable, modulo, compare, number, cursor.since(start))
