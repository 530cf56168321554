"""Statements -> syntax tree: every word is judged here, with all that is known about the place where it stands.

Mistakes are collected per statement, so one run reports them all. What needs other files (names of formats and sets,
`extends`) is checked in `load.py`; what needs a model, in `resolve.py`. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span
from fp8c.specs import ast
from fp8c.specs import vocabulary as vocab
from fp8c.specs.cursor import Cursor, Mistake
from fp8c.specs.expressions import read_comparison, read_condition, read_format, read_group, read_selector, read_value
from fp8c.specs.parser import Source, Statement, parse
from fp8c.specs.vocabulary import FormatValue, Type, did_you_mean

MAX_DIAGNOSTICS = 100  # of one file: who reads more


def check(source: Source) -> ast.File:
    """Parse and check one file. Raises DiagnosticError with every mistake found (exit code SPEC)."""
    checker = _Checker(source)
    file = checker.file(parse(source))
    if checker.diagnostics:
        raise DiagnosticError(checker.diagnostics[:MAX_DIAGNOSTICS], ExitCode.SPEC)
    return file


def _doc(statement: Statement) -> str:
    return "\n".join(d.text[2:].strip() for d in statement.docs)


def examine(source: Source) -> tuple[ast.File | None, tuple[Diagnostic, ...]]:
    """The tree of what could be read, None where nothing could, and every mistake: for editors, whose text is half written."""
    checker = _Checker(source)
    try:
        file = checker.file(parse(source))
    except DiagnosticError as e:
        return None, e.diagnostics
    return file, tuple(checker.diagnostics[:MAX_DIAGNOSTICS])


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
            except Mistake as mistake:
                self.diagnostics.append(mistake.diagnostic)

    def cursor(self, statement: Statement) -> Cursor:
        return Cursor(self.source, statement.pieces, statement.stop)

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
        except Mistake as mistake:
            self.diagnostics.append(mistake.diagnostic)
        return is_version

    def once(self, named: list[tuple[str, Span]], what: str) -> None:
        seen: dict[str, Span] = {}
        for name, span in named:
            if name in seen:
                self.report("E0201", f"{what} `{name}` is defined twice", span, related=(("the first", seen[name]),))
            seen.setdefault(name, span)

    def use(self, cursor: Cursor) -> ast.Use:
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

    def named_format(self, cursor: Cursor, doc: str) -> ast.NamedFormat:
        cursor.expect("format")
        name = cursor.take("WORD", "the format's name")
        if name.text in vocab.ELEMENTS or name.text == "off":
            cursor.fail(f"`{name.text}` is a word of the language and cannot name a format", at=name)
        cursor.expect("=")
        value = read_format(cursor)
        cursor.done()
        return ast.NamedFormat(name.text, value, cursor.span(name), doc)

    def named_set(self, cursor: Cursor, doc: str) -> ast.NamedSet:
        cursor.expect("set")
        name = cursor.take("WORD", "the set's name")
        cursor.expect("=")
        selector = read_selector(cursor)
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

    def modifiers(self, cursor: Cursor) -> ast.Modifiers:
        given: list[str] = []
        while cursor.kind == "WORD" and cursor.text in vocab.MODIFIERS:
            if cursor.text in given:
                cursor.fail(f"`{cursor.text}` is written twice")
            given.append(cursor.text)
            cursor.at += 1
        return ast.Modifiers(**{word: True for word in given})

    def target(self, cursor: Cursor) -> ast.Target:
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
            requires = read_condition(cursor)
        cursor.done()
        return ast.Target(tuple(names), requires, span)

    def expectation(self, cursor: Cursor) -> ast.Expect:
        start = cursor.at
        cursor.expect("expect")
        selector = read_selector(cursor)
        cursor.expect("matches")
        compare = read_comparison(cursor)
        count = cursor.integer("an integer count", 0, 10**9)
        cursor.done()
        return ast.Expect(selector, compare, count, cursor.since(start))

    # -- rules and sections --------------------------------------------------------------------------------------------

    def rule(self, statement: Statement, cursor: Cursor, modifiers: ast.Modifiers) -> ast.Rule:
        cursor.expect("rule")
        name = cursor.take("WORD", "the rule's name")
        selector: ast.Selector = ast.All(cursor.span(name))
        try:
            cursor.expect("for")
            selector = read_selector(cursor)
            cursor.done()
        except Mistake as mistake:  # what the rule says is checked all the same
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

    def section(self, statement: Statement, cursor: Cursor, modifiers: ast.Modifiers) -> ast.Section:
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

    def because(self, cursor: Cursor) -> str:
        text, _ = cursor.string("the reason as a string")
        cursor.done()
        return text

    def gemm_field(self, statement: Statement, gemm: str) -> ast.Field:
        self.needs_semicolon(statement)
        return self.assignment(self.cursor(statement), vocab.GEMM_FIELDS[gemm], f"`{gemm}`", f"{gemm}.")

    def assignment(self, cursor: Cursor, types: dict[str, Type], where: str, prefix: str) -> ast.Field:
        """`name = value`, where `types` says which names there are and what each takes."""
        if cursor.kind != "WORD" or cursor.text not in types:
            help = did_you_mean(cursor.text, types) if cursor.kind == "WORD" else did_you_mean("", types)
            found = f"{where} has no `{cursor.text}`" if cursor.kind == "WORD" else f"expected a name, {cursor.found()}"
            cursor.fail(found, help=help)
        name = cursor.take("WORD", "a name").text
        cursor.expect("=")
        start = cursor.at
        value = read_value(cursor, types[name], name)
        span = cursor.since(start)
        cursor.done()
        return ast.Field(prefix + name, value, span)

    def cache(self, cursor: Cursor) -> list[ast.Field]:
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
        fields = [ast.Field(f"cache.{name}", read_format(cursor), cursor.since(start))]
        if cursor.piece is not None:
            start = cursor.at
            cursor.expect("retile")
            _, text = read_group(cursor)
            exact = cursor.accept("exact") if cursor.kind == "WORD" else False
            cursor.done()
            fields.append(ast.Field(f"retile.{name}", (text, exact), cursor.since(start)))
        return fields

    def recompute(self, cursor: Cursor) -> list[ast.Field]:
        fields: list[ast.Field] = []
        while True:
            token = cursor.choice(vocab.RECOMPUTED_VALUES, "a recomputed value")
            fields.append(ast.Field(f"recompute.{token.text}", True, cursor.span(token)))
            if not cursor.accept(","):
                break
        cursor.done()
        return fields
