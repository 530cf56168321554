"""Formats and selectors: what stands to the right of `=`, `for` and `as`, read from a cursor. No torch here.

Every function raises `Mistake` at the piece that does not fit, and leaves the cursor behind what it read.
"""

from __future__ import annotations

from fp8c.diagnostics import Diagnostic, Span
from fp8c.formats import MAX, WHOLE, Delayed, Element, Format, Rounding, ScaleKind
from fp8c.specs import ast, globs
from fp8c.specs import vocabulary as vocab
from fp8c.specs.cursor import MAX_DIGITS, Cursor, Mistake
from fp8c.specs.parser import Bracket
from fp8c.specs.vocabulary import FormatValue, Integer, Type, Words, did_you_mean

MAX_GROUP = 1 << 16


def read_value(cursor: Cursor, type_: Type, name: str) -> ast.Value:
    match type_:
        case Integer(least, most):
            return cursor.integer(f"an integer {name}", least, most)
        case Words(choices):
            return cursor.choice(choices, f"a value for {name}").text
        case FormatValue(plain, or_off):
            if or_off and cursor.kind == "WORD" and cursor.accept("off"):
                return "off"
            start = cursor.at
            value = read_format(cursor)
            if plain and isinstance(value, Format) and value.is_quantized:
                cursor.at = start
                cursor.fail(
                    f"`{name}` is kept without scales: it cannot be {value.element.value}",
                    code="E0404",
                    help="write `bf16`, `fp16` or `fp32`",
                )
            return value


# -- formats -----------------------------------------------------------------------------------------------------------


def read_format(cursor: Cursor) -> Format | ast.FormatRef:
    start = cursor.at
    if cursor.kind != "WORD":
        cursor.fail(
            f"expected a format, {cursor.found()}",
            help="write for example `e4m3 [1x128] scale fp32 online`, or a format's name",
        )
    word = cursor.text
    if word in vocab.ELEMENTS:
        return read_literal_format(cursor)
    cursor.at += 1
    if cursor.text == "." and cursor.kind == "MARK":
        cursor.at += 1
        part = cursor.take("WORD", f"a format's name after `{word}.`")
        return ast.FormatRef(f"{word}.{part.text}", cursor.since(start))
    if cursor.text in ("[", "scale"):  # only an element is followed by these
        cursor.at -= 1
        cursor.fail(f"unknown element `{word}`", help=did_you_mean(word, vocab.ELEMENTS))
    return ast.FormatRef(word, cursor.since(start))


def read_literal_format(cursor: Cursor) -> Format:
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
    group, _ = read_group(cursor)
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
            word = cursor.take("WORD", "`online`")
            if word.text == "delayed":
                if group != (WHOLE, WHOLE):
                    help = "write `[tensor]`"
                    cursor.fail("delayed scales are for one scale for a tensor", code="E0421", at=word, help=help)
                delayed = read_delayed(cursor.bracket("(", "`(` after `delayed`"))
        else:
            choices = ("online", "delayed", *vocab.ROUNDINGS)
            cursor.fail(f"unexpected word `{cursor.text}` in a format", help=did_you_mean(cursor.text, choices))
    return Format(element, group, scale, rounding or Rounding.RNE, delayed)


def read_group(cursor: Cursor) -> tuple[tuple[int, int], str]:
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


def read_delayed(inside: Cursor) -> Delayed:
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
        value = read_value(inside, types[token.text], token.text)
        assert isinstance(value, (int, str))
        given[token.text] = value
        if not inside.accept(","):
            break
    inside.done()
    return Delayed(**given)  # type: ignore[arg-type]


# -- selectors ---------------------------------------------------------------------------------------------------------


def read_selector(cursor: Cursor) -> ast.Selector:
    """`a | b & !c`; `&` binds tighter than `|`, brackets as usual."""
    start = cursor.at
    branches: list[ast.Selector] = []
    while True:
        first = cursor.at
        parts = [read_negation(cursor)]
        while cursor.accept("&"):
            parts.append(read_negation(cursor))
        branches.append(parts[0] if len(parts) == 1 else ast.And(tuple(parts), cursor.since(first)))
        if not cursor.accept("|"):
            break
    if cursor.kind == "WORD" and cursor.text in ("and", "or", "not"):
        cursor.fail(f"expected `&`, `|` or `!`, found `{cursor.text}`")
    return branches[0] if len(branches) == 1 else ast.Or(tuple(branches), cursor.since(start))


def read_negation(cursor: Cursor) -> ast.Selector:
    start = cursor.at
    while cursor.accept("!"):
        pass
    is_negated = (cursor.at - start) % 2 == 1
    atom = read_atom(cursor)
    return ast.Not(atom, cursor.since(start)) if is_negated else atom


def read_atom(cursor: Cursor) -> ast.Selector:
    start = cursor.at
    piece = cursor.piece
    if isinstance(piece, Bracket) and piece.text == "(":
        inside = cursor.bracket("(", "`(`")
        selector = read_selector(inside)
        inside.done()
        return selector
    if cursor.kind == "STRING":
        return read_glob(cursor, "path")
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
    selector = read_predicate(word, inside, cursor, start)
    inside.done()
    return selector


def read_predicate(word: str, inside: Cursor, cursor: Cursor, start: int) -> ast.Selector:
    """What stands in the brackets of `word(...)`; a `?` after the bracket holds for every value in it."""
    maybe = cursor.accept("?")
    span = cursor.since(start)
    if inside.piece is None:
        inside.fail(f"`{word}()` needs a value")
    if word == "shape":
        return ast.Shape(read_condition(inside), span, maybe)
    if word == "param":
        glob = read_glob(inside, "param")
        return ast.Glob(
            "param", ast.Alternative(glob.pattern.text, glob.pattern.span, glob.pattern.maybe or maybe), span
        )
    if word == "layers":
        ranges: list[ast.LayerRange] = []
        while True:
            ranges.append(read_layers(inside, maybe))
            if not inside.accept(","):
                return ast.Layers(tuple(ranges), span)
    known = vocab.PREDICATE_VALUES[word]
    values: list[ast.Alternative] = []
    while True:
        token = inside.choice(known, f"a {word}")
        values.append(ast.Alternative(token.text, inside.span(token), inside.accept("?") or maybe))
        if not inside.accept(","):
            return ast.Among(word, tuple(values), span)


def read_layers(inside: Cursor, maybe: bool) -> ast.LayerRange:
    start = inside.at
    first = last = inside.integer("an integer layer", -(10**6), 10**6)
    if inside.accept(".."):
        last = inside.integer("an integer layer", -(10**6), 10**6)
    if (first < 0) == (last < 0) and last < first:
        inside.at = start
        inside.fail(f"the range {first}..{last} is empty", help=f"write `{last}..{first}`")
    span = inside.since(start)
    return ast.LayerRange(first, last, span, inside.accept("?") or maybe)


def read_glob(cursor: Cursor, of: str) -> ast.Glob:
    text, token = cursor.string("a pattern as a string")
    try:
        globs.expand(text)
    except globs.BadGlob as e:
        place = Span(
            cursor.source.path,
            token.line,
            token.column + 1 + min(e.offset, max(0, len(token.text) - 2)),
            1,
            cursor.source.line(token.line),
        )
        raise Mistake(Diagnostic("E0106", f"not a path pattern: {e}", place, help=e.help)) from None
    maybe = cursor.accept("?")
    span = cursor.span(token)
    return ast.Glob(of, ast.Alternative(text, span, maybe), span)


def read_condition(cursor: Cursor) -> ast.Condition:
    start = cursor.at
    any_of: list[tuple[ast.Term, ...]] = []
    while True:
        all_of = [read_term(cursor)]
        while cursor.accept("and"):
            all_of.append(read_term(cursor))
        any_of.append(tuple(all_of))
        if not cursor.accept("or"):
            return ast.Condition(tuple(any_of), cursor.since(start))


def read_term(cursor: Cursor) -> ast.Term:
    start = cursor.at
    variable = cursor.choice(vocab.SHAPE_VARIABLES, "a size").text
    modulo = cursor.integer("an integer divisor", 1, 10**9) if cursor.accept("%") else 0
    compare = read_comparison(cursor)
    number = cursor.integer("an integer size", 0, 10**9)
    return ast.Term(variable, modulo, compare, number, cursor.since(start))


def read_comparison(cursor: Cursor) -> str:
    if cursor.text not in vocab.COMPARISONS:
        help = "write `==`" if cursor.text == "=" else ""
        cursor.fail(f"expected a comparison such as `>=`, {cursor.found()}", help=help)
    text = cursor.text
    cursor.at += 1
    return text
