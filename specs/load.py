"""Find, check and link specs: `use`, `extends`, and names replaced by what they stand for. No torch here.

A `Spec` is the chain of specs from the one that extends nothing to the one asked for. It holds no reference any more:
formats are `Format`s, sets are selectors, so the resolver needs no scopes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span
from fp8c.formats import Element, Format, ScaleKind
from fp8c.roles import OPERANDS
from fp8c.specs import ast, parser
from fp8c.specs.check import check
from fp8c.specs.vocabulary import ELEMENTS, did_you_mean

STD = Path(__file__).resolve().parent
MAX_USE_DEPTH = 16
MAX_SELECTOR_DEPTH = 300  # selectors are walked by recursion; sets may use sets


@dataclass(frozen=True)
class Layer:
    """One spec of the chain, linked. `file` is the name that goes into locks."""

    name: str
    file: str
    doc: str
    target: ast.Target | None
    rules: tuple[ast.Rule, ...]
    sections: tuple[ast.Section, ...]
    expects: tuple[ast.Expect, ...]


@dataclass(frozen=True)
class Spec:
    """A spec ready to be resolved. `layers` go from the root of the chain to the spec itself; `digest` is a SHA-256
    over the text of every file that was read, and `texts` are those, by name."""

    name: str
    path: str
    layers: tuple[Layer, ...]
    digest: str
    texts: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @property
    def target(self) -> ast.Target | None:
        """The nearest `target` statement of the chain."""
        return next((layer.target for layer in reversed(self.layers) if layer.target), None)


def shipped() -> list[str]:
    """Names of the specs that come with fp8c."""
    return sorted(path.stem for path in STD.glob("*.fp8"))


def shipped_text(name: str) -> str:
    """The text of a shipped spec. Raises DiagnosticError E0603."""
    name = name.removeprefix("std:")
    if name not in shipped():
        help = did_you_mean(name, shipped())
        raise _error("E0603", f"no shipped spec is called `{name}`", None, help)
    return (STD / f"{name}.fp8").read_text(encoding="utf-8")


def load(spec: str | Path) -> Spec:
    """Load a shipped spec by name (`deepseek_v3`, `std:deepseek_v3`) or a file by path.

    Raises DiagnosticError with every mistake of the first file that has any (exit code SPEC).
    """
    text = str(spec)
    name = text.removeprefix("std:")
    if isinstance(spec, str) and (text.startswith("std:") or ("/" not in text and not text.endswith(".fp8"))):
        if name not in shipped():
            raise _error(
                "E0603",
                f"no spec is called `{name}`",
                None,
                help=f"did you mean the file `{name}.fp8`?"
                if Path(f"{name}.fp8").is_file()
                else did_you_mean(name, shipped()) or "write a path that ends in .fp8",
            )
        return _Loader(STD).load(_std_source(name))
    path = Path(spec)
    return _Loader(path.resolve().parent).load(parser.read(path, path.name))


def load_file(path: Path) -> Spec | ast.File:
    """Load a file as `load` does; a file of formats and sets alone, which is for `use`, is checked and given back."""
    return load_source(parser.read(path, path.name), path.resolve().parent)


def load_source(source: parser.Source, root: Path | None) -> Spec | ast.File:
    """`load_file` for text that need not be a file yet; relative `use` paths start at `root`."""
    loader = _Loader(root)
    unit = loader.unit(source, root, ())
    if unit.file.spec is not None:
        return loader.load(source)
    mistakes: list[Diagnostic] = []
    _Linker(unit, mistakes).names()
    if mistakes:
        raise DiagnosticError(_distinct(mistakes), ExitCode.SPEC)
    return unit.file


class Scope:
    """The names of one file: what its formats, sets and selectors stand for.

    Raises: DiagnosticError when the file, or one it uses, has mistakes
    """

    def __init__(self, source: parser.Source, root: Path | None) -> None:
        self._unit = _Loader(root).unit(source, root, ())
        self.file = self._unit.file

    def formats(self) -> dict[str, ast.NamedFormat]:
        """Named formats as this file writes them: its own, and `alias.name` of those it uses."""
        used = {f"{alias}.{f.name}": f for alias, unit in self._unit.used.items() for f in unit.file.formats}
        return {f.name: f for f in self.file.formats} | used

    def sets(self) -> dict[str, ast.NamedSet]:
        used = {f"{alias}.{s.name}": s for alias, unit in self._unit.used.items() for s in unit.file.sets}
        return {s.name: s for s in self.file.sets} | used

    def aliases(self) -> tuple[str, ...]:
        return tuple(self._unit.used)

    def format(self, name: str) -> Format:
        """What a name stands for. Raises: KeyError for an unknown one."""
        named = self.formats()[name]
        unit = self._unit.used[name.partition(".")[0]] if "." in name else self._unit
        return _Linker(unit, []).format(named.value)

    def selector(self, selector: ast.Selector) -> ast.Selector:
        """A selector of this file without names of sets."""
        return _Linker(self._unit, []).selector(selector)[0]


def loads(text: str, name: str = "<spec>", root: Path | None = None) -> Spec:
    """Load a spec from text; relative `use` paths start at `root`, and without one only `std:` files can be used."""
    return _Loader(root.resolve() if root else None).load(parser.source_of(text, name))


def _std_source(name: str) -> parser.Source:
    source = parser.read(STD / f"{name}.fp8", f"std:{name}")
    return replace(source, path=f"{name}.fp8")


def _error(
    code: str, message: str, span: Span | None, help: str = "", related: tuple[tuple[str, Span], ...] = ()
) -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, help=help, related=related)], ExitCode.SPEC)


@dataclass
class _Unit:
    """A checked file with the files it uses, by alias."""

    file: ast.File
    used: dict[str, _Unit]
    formats: dict[str, Format] = field(default_factory=dict)  # linked so far
    sets: dict[str, tuple[ast.Selector, int]] = field(default_factory=dict)  # linked so far, with their depth

    def __post_init__(self) -> None:
        self.format_values = {f.name: f.value for f in self.file.formats}
        self.set_selectors = {s.name: s.selector for s in self.file.sets}


class _Loader:
    """Reads files below `root` and shipped ones, each once."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.units: dict[str, _Unit] = {}
        self.texts: dict[str, str] = {}

    def load(self, source: parser.Source) -> Spec:
        unit = self.unit(source, self.root, ())
        spec = unit.file.spec
        if spec is None:
            raise _error(
                "E0206",
                "the file holds no spec",
                Span(unit.file.path, 1),
                help="add `spec NAME { ... }`; a file of formats and sets alone is for `use`",
            )
        layers: list[Layer] = []
        mistakes: list[Diagnostic] = []
        while True:
            assert unit.file.spec is not None
            layers.append(_Linker(unit, mistakes).layer(unit.file.spec))
            parent = self.parent(unit)
            if parent is None:
                break
            unit = parent
        if mistakes:
            raise DiagnosticError(_distinct(mistakes), ExitCode.SPEC)
        digest = hashlib.sha256()
        for name in sorted(self.texts):
            digest.update(f"{name}\0{self.texts[name]}\0".encode("utf-8", "surrogateescape"))
        texts = tuple(sorted(self.texts.items()))
        return Spec(spec.name, source.path, tuple(reversed(layers)), digest.hexdigest(), texts)

    def parent(self, unit: _Unit) -> _Unit | None:
        spec = unit.file.spec
        assert spec is not None
        if not spec.extends:
            return None
        parent = unit.used.get(spec.extends)
        if parent is None:
            help = did_you_mean(spec.extends, unit.used)
            if not unit.used:
                help = f'write `use "std:{spec.extends}";` above the spec' if spec.extends in shipped() else ""
            raise _error("E0202", f"no used file is called `{spec.extends}`", spec.extends_span, help)
        if parent.file.spec is None:
            raise _error("E0206", f"`{spec.extends}` holds no spec to extend", spec.extends_span)
        return parent

    def unit(self, source: parser.Source, folder: Path | None, chain: tuple[tuple[str, Span], ...]) -> _Unit:
        """Check a file and the files it uses. `folder` is the file's own; `chain` the `use` statements that led here."""
        if source.name in self.units:
            return self.units[source.name]
        self.texts[source.name] = source.text.replace("\r\n", "\n")
        file = check(source)
        used: dict[str, _Unit] = {}
        for use in file.uses:
            step = (*chain, (source.name, use.span))
            if len(step) > MAX_USE_DEPTH:
                raise _error("E0604", f"files use each other more than {MAX_USE_DEPTH} deep", use.span)
            inner, inner_folder = self.find(use, folder, source.name)
            if any(inner.name == name for name, _ in step):
                raise _error(
                    "E0205",
                    f"`{inner.name}` uses itself",
                    use.span,
                    related=tuple((f"{name} uses", span) for name, span in step[:-1]),
                )
            used[use.alias] = self.unit(inner, inner_folder, step)
        unit = self.units[source.name] = _Unit(file, used)
        return unit

    def find(self, use: ast.Use, folder: Path | None, user: str) -> tuple[parser.Source, Path]:
        if use.file.startswith("std:"):
            name = use.file.removeprefix("std:")
            if name not in shipped():
                raise _error("E0603", f"no shipped spec is called `{name}`", use.span, did_you_mean(name, shipped()))
            return _std_source(name), STD
        root = STD if user.startswith("std:") else self.root
        if root is None or folder is None:
            raise _error("E0601", "this spec has no folder: it can use `std:` files only", use.span)
        try:
            path = (folder / use.file).resolve()
            is_inside = path.is_relative_to(root)
        except (OSError, ValueError, RuntimeError) as e:  # a NUL, a loop of links
            raise _error("E0603", f"cannot read `{use.file}`: {e}", use.span) from None
        if not is_inside:
            raise _error(
                "E0601",
                f"`{use.file}` lies outside of the spec's folder {root.name}/",
                use.span,
                help="a spec reads files below the folder of the spec that was asked for, and `std:` ones",
            )
        if not path.is_file():
            raise _error(
                "E0603", f"there is no file `{use.file}`", use.span, help="the path starts at this file's folder"
            )
        return parser.read(path, path.relative_to(root).as_posix()), path.parent


def _distinct(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    return list(dict.fromkeys(diagnostics))


class _Linker:
    """Replaces names by what they stand for, in the scope of one file."""

    def __init__(self, unit: _Unit, mistakes: list[Diagnostic]) -> None:
        self.unit, self.mistakes = unit, mistakes

    def mistake(self, code: str, message: str, span: Span | None, help: str = "") -> None:
        self.mistakes.append(Diagnostic(code, message, span, help=help))

    def names(self) -> None:
        """Link every format and set of the file, used or not, so that a mistake in any is found."""
        for named in self.unit.file.formats:
            self.format(named.value)
        for named_set in self.unit.file.sets:
            self.selector(ast.SetRef(named_set.name, named_set.span))

    def layer(self, spec: ast.SpecDecl) -> Layer:
        self.names()
        return Layer(
            spec.name,
            self.unit.file.name,
            spec.doc,
            spec.target,
            tuple(self.rule(rule) for rule in spec.rules),
            tuple(
                replace(section, fields=tuple(self.section_field(section, f) for f in section.fields))
                for section in spec.sections
            ),
            tuple(replace(expect, selector=self.selector(expect.selector)[0]) for expect in spec.expects),
        )

    # -- formats -------------------------------------------------------------------------------------------------------

    def format(self, value: Format | ast.FormatRef) -> Format:
        """The format a reference stands for. A mistake gives FP32, so that checking can go on."""
        unit, start = self.unit, value
        chain: dict[tuple[int, str], _Unit] = {}
        while isinstance(value, ast.FormatRef):
            alias, _, name = value.name.rpartition(".")
            scope = unit.used.get(alias) if alias else unit
            if scope is None:
                self.mistake("E0202", f"no used file is called `{alias}`", value.span, did_you_mean(alias, unit.used))
                return Format(Element.FP32)
            found = scope.formats.get(name, scope.format_values.get(name))
            if found is None:
                known = {f"{alias}.{n}" for n in scope.format_values} if alias else {*scope.format_values, *ELEMENTS}
                self.mistake(
                    "E0202", f"no format is called `{value.name}`", value.span, did_you_mean(value.name, known)
                )
                return Format(Element.FP32)
            if (id(scope), name) in chain:
                assert isinstance(start, ast.FormatRef)
                self.mistake("E0205", f"format `{start.name}` is defined by itself", start.span)
                return Format(Element.FP32)
            chain[id(scope), name] = scope
            unit, value = scope, found
        for (_, name), scope in chain.items():
            scope.formats[name] = value
        return value

    def field(self, field: ast.Field) -> ast.Field:
        if not isinstance(field.value, (Format, ast.FormatRef)):
            return field
        before = len(self.mistakes)
        linked = replace(field, value=self.format(field.value))
        return linked if len(self.mistakes) == before else field

    def section_field(self, section: ast.Section, field: ast.Field) -> ast.Field:
        linked = self.field(field)
        if isinstance(linked.value, Format) and section.name == "optimizer" and linked.value.is_quantized:
            self.not_plain(linked)
        elif isinstance(linked.value, Format) and linked.value.element is Element.E5M6:
            self.mistake("E0404", "e5m6 is a cache format: it is never sent", linked.span)
        return linked

    def not_plain(self, field: ast.Field) -> None:
        assert isinstance(field.value, Format)
        self.mistake(
            "E0404",
            f"`{field.name}` is kept without scales: it cannot be {field.value.element.value}",
            field.span,
            "write `bf16`, `fp16` or `fp32`",
        )

    def rule(self, rule: ast.Rule) -> ast.Rule:
        fields = tuple(self.field(field) for field in rule.fields)
        by_name = {field.name: field for field in fields}
        operands = {f"{gemm}.{operand}" for gemm, names in OPERANDS.items() for operand in names}
        for given in fields:
            if isinstance(given.value, Format):
                if given.name in operands and given.value.element is Element.E5M6:
                    self.mistake(
                        "E0404",
                        f"e5m6 is a cache format: no tensor core reads it as {given.name}",
                        given.span,
                        "write an e4m3 format here and `cache x as ...` for the copy that backward keeps",
                    )
                elif given.value.is_quantized and (given.name == "precision" or given.name.endswith(".out")):
                    self.not_plain(given)
            elif given.name.startswith("retile."):
                cached = by_name["cache." + given.name.partition(".")[2]].value
                assert isinstance(given.value, tuple)
                if isinstance(cached, Format) and not cached.is_quantized:
                    self.mistake("E0506", f"{cached.text} has no groups to retile", given.span, "delete `retile ...`")
                elif isinstance(cached, Format) and given.value[1] and cached.scale is ScaleKind.FP32:
                    self.mistake(
                        "E0501",
                        "an exact retile needs power-of-two scales, and these are fp32",
                        given.span,
                        "write `scale pow2` in the cached format, or delete `exact`: the copy is then rounded a second time",
                    )
        return replace(rule, fields=fields, selector=self.selector(rule.selector)[0])

    # -- selectors -----------------------------------------------------------------------------------------------------

    def selector(self, selector: ast.Selector) -> tuple[ast.Selector, int]:
        """The selector without set names, and how deep it nests."""
        match selector:
            case ast.SetRef(name, span):
                return self.named_set(name, span)
            case ast.Not(inner):
                linked, depth = self.selector(inner)
                return self.bounded(replace(selector, inner=linked), depth + 1)
            case ast.And(parts) | ast.Or(parts):
                linked_parts = [self.selector(part) for part in parts]
                whole = replace(selector, parts=tuple(part for part, _ in linked_parts))
                return self.bounded(whole, 1 + max(depth for _, depth in linked_parts))
        return selector, 1

    def bounded(self, selector: ast.Selector, depth: int) -> tuple[ast.Selector, int]:
        if depth > MAX_SELECTOR_DEPTH:
            self.mistake("E0104", f"sets nest more than {MAX_SELECTOR_DEPTH} deep", selector.span)
            return ast.All(selector.span), 1
        return selector, depth

    def named_set(self, name: str, span: Span) -> tuple[ast.Selector, int]:
        alias, _, local = name.rpartition(".")
        unit = self.unit.used.get(alias) if alias else self.unit
        if unit is None:
            self.mistake("E0202", f"no used file is called `{alias}`", span, did_you_mean(alias, self.unit.used))
            return ast.All(span), 1
        if local in unit.sets:
            return unit.sets[local]
        found = unit.set_selectors.get(local)
        if found is None:
            known = {f"{alias}.{n}" if alias else n for n in unit.set_selectors}
            self.mistake("E0202", f"no set is called `@{name}`", span, did_you_mean(name, known))
            return ast.All(span), 1
        waiting = self.waiting
        if (id(unit), local) in waiting:
            self.mistake("E0205", f"set `@{name}` is defined by itself", span)
            return ast.All(span), 1
        if len(waiting) >= MAX_USE_DEPTH * 4:
            self.mistake("E0104", "sets use sets too deep", span)
            return ast.All(span), 1
        inner = _Linker(unit, self.mistakes)
        inner.waiting = waiting | {(id(unit), local)}
        unit.sets[local] = linked = inner.selector(found)
        return linked

    waiting: frozenset[tuple[int, str]] = frozenset()
