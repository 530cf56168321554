"""`fp8c explain BUILD WHAT`: why a use of a build has the precision it has, from the build's files alone. No torch here.

For each decision: the value, the rule with its line in the spec, what that rule overrode, and what the other formats
would cost in bytes. WHAT is a use, a module, a node of a graph, a section (`dispatch.payload`) or a selector of the spec
language; uses whose answers differ only in their layer are told once.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from fp8c.build import Build
from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.formats import Format
from fp8c.roles import OPERANDS
from fp8c.specs import ast
from fp8c.specs.load import loads, shipped
from fp8c.specs.plan import uses_from_json
from fp8c.specs.select import Selection, indices
from fp8c.tools.build_contents import read_lock

SCHEMA = "fp8c.explain/1"
GRAPHS = ("forward", "backward", "captured")

#: Formats every operand's cost is also given in, beside those a rule asked for. E5M6 is for values kept, never operands.
OPERAND_FORMATS = ("e4m3[1x128] fp32", "e4m3[1x32] e8m0", "bf16")
WEIGHT_FORMATS = ("e4m3[128x128] fp32", "e4m3[1x32] e8m0", "bf16")
CACHE_FORMATS = ("e4m3[1x128] fp32", "e5m6[1x128] pow2", "bf16")

_LANGUAGE = re.compile(r"[()&|!@\"~*{}\[\]]")  # what only a selector has; a path has letters, digits, `.:#_`
_PATTERN = re.compile(r"[\w.*{},\[\]-]+")
_NODE = re.compile(r"%?(\w+)")


@dataclass(frozen=True)
class Because:
    """A rule: its name, spec, place, the spec's line as the build keeps it, and its `because` text."""

    rule: str
    spec: str
    file: str
    line: int
    because: str
    text: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Cost:
    """Bytes of one value in one format. `chosen`: the build has it in this one."""

    format: str
    size_bytes: int
    chosen: bool


@dataclass(frozen=True)
class Answer:
    """One decision. `overrode`: values given up for it, nearest first, each with its rule."""

    field: str
    value: str
    because: Because
    overrode: tuple[tuple[str, Because], ...] = ()
    costs: tuple[Cost, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """All answers for one use, or for a section (then `op` is "section").

    layers: every layer with the same answers; empty outside of layers. keys: their uses
    nodes:  lines of the graphs that were asked for by name, as (graph, line, why it is saved)
    """

    key: str
    op: str
    words: tuple[str, ...] = ()
    shape: tuple[int | None, ...] = ()
    experts: int = 1
    param: str = ""
    source: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    layers: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    nodes: tuple[tuple[str, str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(build: Build, what: str) -> list[Explanation]:
    """Raises: DiagnosticError E0615 when the build has nothing of this name, or the selector matches nothing in it;
    a selector's own mistakes with the codes of the language."""
    reader = _Reader(build)
    if _LANGUAGE.search(what) or what == "all":
        return reader.fold(reader.select(what))
    keys = reader.named(what)
    if keys:
        return reader.fold(keys)
    section = reader.section(what)
    if section:
        return section
    node = reader.node(what)
    if node is not None:
        return [node]
    raise reader.unknown(what)


class _Reader:
    """A build's lock and graphs, read as far as a question needs them."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.lock = read_lock(build)
        self.uses: Mapping[str, Any] = self.lock["uses"]

    @cached_property
    def notes(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.build.json("graphs/notes.json") if self.build.has("graphs/notes.json") else {}
        return found

    @cached_property
    def spec_lines(self) -> dict[str, list[str]]:
        files: Mapping[str, str] = self.build.manifest["spec"]["files"]
        return {name: self.build.read(path).decode().splitlines() for name, path in files.items()}

    # -- what is meant -------------------------------------------------------------------------------------------------

    def named(self, what: str) -> list[str]:
        """Uses of this key, of this module, or of a parameter of this name; else all inside the module."""
        exact = [k for k, use in self.uses.items() if what in (k, use["path"], use["param"])]
        return exact or [k for k, use in self.uses.items() if use["path"].startswith(f"{what}.")]

    def select(self, text: str) -> list[str]:
        """Uses a selector matches; `@name` are sets of the build's spec. A path pattern may stand alone."""
        records = list(uses_from_json(self.lock).values())
        rule = self._rule(text)
        selection = Selection(records)
        mask = selection.mask(rule.selector)
        if not mask and _PATTERN.fullmatch(text):  # a module stands for what is inside
            mask = Selection(records).mask(self._rule(f"{text}.**").selector)
        if selection.diagnostics:
            raise DiagnosticError(selection.diagnostics, ExitCode.USAGE)
        if not mask:
            near = [d.help for d in selection.unmatched(rule.selector) if d.help]
            raise fail(
                "E0615",
                f"nothing in {self.build.path} matches {text}",
                help=near[0].partition("; write")[0] if near else "",
                exit_code=ExitCode.USAGE,
            )
        return [records[i].key for i in indices(mask)]

    def _rule(self, text: str) -> ast.Rule:
        """The selector's text as a rule. Raises: DiagnosticError with the selector's mistakes."""
        own = self.build.manifest["spec"]
        name = str(own["reference"]).removeprefix("std:")
        begin, used = "version 1;\n", ""
        if "@" in text:
            used = f"std:{name}" if name in shipped() else f"./{name.rpartition('/')[2]}"
            begin += f'use "{used}" as build;\n'
        selector = re.sub(r"@(?!build\.)", "@build.", text)
        if _PATTERN.fullmatch(text) and text != "all":
            selector = f'"{text}"'
        body = f"spec selection {{ rule selection for {selector} {{ precision = bf16; }} }}\n"
        try:
            spec = loads(begin + body, "<selector>", self.build.path / "spec")
            return next(r for layer in spec.layers for r in layer.rules if r.name == "selection")
        except DiagnosticError as error:
            first = error.diagnostics[0]
            raise fail(
                first.code, first.message, span=_shown(text), help=first.help, exit_code=ExitCode.USAGE
            ) from None

    def section(self, what: str) -> list[Explanation]:
        """`dispatch` or `dispatch.payload`."""
        name, _, key = what.partition(".")
        values = self.lock["sections"].get(name, {})
        wanted = {k: v for k, v in values.items() if not key or k == key}
        if not wanted:
            return []
        answers = tuple(self.answer(f"{name}.{k}", decision) for k, decision in sorted(wanted.items()))
        return [Explanation(what, "section", answers=answers)]

    def node(self, what: str) -> Explanation | None:
        """A node of a graph, with the decisions of the use it belongs to."""
        match = _NODE.fullmatch(what)
        if match is None:
            return None
        name = match[1]
        found = []
        key = ""
        for graph in GRAPHS:
            line = re.search(rf"^  (%{re.escape(name)} = .*)$", self.build.graph_text(graph), re.MULTILINE)
            if line is None:
                continue
            found.append((graph, line[1], self._saved(name) if graph == "forward" else ""))
            note = self.notes.get("roles", {}).get(name, "") if graph == "captured" else _role(line[1])
            words = note.split(" ")
            key = key or next((w for w in reversed(words) if w in self.uses), "")
        if not found:
            return None
        nodes = tuple(found)
        if not key:
            return Explanation(f"%{name}", "node", nodes=nodes)
        return self.one(key, nodes=nodes)

    def _saved(self, name: str) -> str:
        saved = self.notes.get("saved", {}).get(name)
        if saved is None:
            return ""
        reason = saved["reason"]
        rule = f" (rule {reason['rule']}, {reason['file']}:{reason['line']})" if reason else ""
        return f"{saved['why']}{rule}"

    def unknown(self, what: str) -> DiagnosticError:
        """E0615 with the names most like it. Layers of one kind count once, and the layer asked for is kept."""
        layer = _layer(what)
        names: dict[str, str] = {s: s for s in self.lock["sections"]}
        for key in self.uses:
            if _layer(key) == layer or _without_layer(key) not in names:
                names[_without_layer(key)] = key
        near = difflib.get_close_matches(_without_layer(what), names, 3, 0.6)
        if not near:
            ends = {name.rpartition(".")[2]: name for name in names}
            near = [ends[e] for e in difflib.get_close_matches(what.rpartition(".")[2], ends, 3, 0.6)]
        meant = [names[n] for n in near[:1] if _alike(n, _without_layer(what))] or [names[n] for n in near]
        help = f"did you mean {' or '.join(meant)}?" if meant else "`fp8c inspect --text` lists the modules"
        return fail(
            "E0615",
            f"{self.build.path} has no use, module, section or node '{what}'",
            help=help,
            exit_code=ExitCode.USAGE,
        )

    # -- answers -------------------------------------------------------------------------------------------------------

    def one(self, key: str, nodes: tuple[tuple[str, str, str], ...] = ()) -> Explanation:
        use = self.uses[key]
        shape = use["shape"]
        return Explanation(
            key,
            use["op"],
            (*use["roles"], *use["kinds"]),
            (shape["m"], shape["n"], shape["k"]),
            shape["experts"],
            use["param"] or "",
            use["source"] or "",
            {w: use[f"no_{w}"] for w in ("dgrad", "wgrad") if use[f"no_{w}"]},
            tuple(self.answer(name, use["fields"][name], use) for name in _ordered(use["fields"])),
            nodes=nodes,
        )

    def answer(self, name: str, decision: Mapping[str, Any], use: Mapping[str, Any] | None = None) -> Answer:
        overrode = tuple((value_words(o["value"]), self.because(o["reason"])) for o in decision["overrode"])
        value = value_words(decision["value"])
        others = [text for text, _ in overrode]
        costs = _costs(name, value, others, use["shape"]) if use is not None else ()
        return Answer(name, value, self.because(decision["reason"]), overrode, costs)

    def because(self, reason: Mapping[str, Any]) -> Because:
        lines = self.spec_lines.get(reason["file"], [])
        line = reason["line"]
        return Because(**reason, text=lines[line - 1].strip() if 0 < line <= len(lines) else "")

    def fold(self, keys: Iterable[str]) -> list[Explanation]:
        """Explanations of these uses, those that differ in their layer only told once."""
        groups: dict[str, list[str]] = {}
        for key in keys:
            use = self.uses[key]
            same = {k: v for k, v in use.items() if k not in ("path", "param")}
            groups.setdefault(json.dumps([_without_layer(key), same]), []).append(key)
        found = []
        for members in groups.values():
            members.sort(key=lambda k: -1 if (layer := _layer(k)) is None else layer)
            layers = tuple(layer for k in members if (layer := _layer(k)) is not None)
            one = self.one(members[0])
            found.append(Explanation(**{**vars(one), "layers": layers, "keys": tuple(members)}))
        return found


def _shown(selector: str) -> Span:
    return Span("<selector>", 1, 1, len(selector), selector)


def _role(line: str) -> str:
    return line.rpartition("   # ")[2].rpartition("  ")[0]


def value_words(value: Any) -> str:
    """A value of a lock as the language writes it; a retile is its group and whether it must be exact."""
    if isinstance(value, list):
        group, is_exact = value
        return f"[{group}] exact" if is_exact else f"[{group}]"
    return str(value)


def _layer(key: str) -> int | None:
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)


def _without_layer(key: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", key, count=1)


def _alike(a: str, b: str) -> bool:
    """Whether two names differ by a slip of the fingers."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.95


def _ordered(fields: Mapping[str, Any]) -> list[str]:
    """fprop, dgrad, wgrad with their operands first, then what backward keeps."""
    groups = ("precision", "fprop", "dgrad", "wgrad", "cache", "retile", "recompute")
    rank = {g: i for i, g in enumerate(groups)}
    operands = {"x": 0, "dy": 1, "w": 2}

    def place(name: str) -> tuple[int, int, str]:
        group, _, rest = name.partition(".")
        return rank.get(group, len(rank)), operands.get(rest, 9), name

    return sorted(fields, key=place)


def _costs(name: str, value: str, others: Sequence[str], shape: Mapping[str, Any]) -> tuple[Cost, ...]:
    """The value in the chosen format, in those it overrode, and in the common ones; () for what is no tensor or has a
    size only a run knows."""
    group, _, operand = name.partition(".")
    sizes = {
        "x": (shape["m"], shape["k"]),
        "w": (None if shape["n"] is None else shape["n"] * shape["experts"], shape["k"]),
        "dy": (shape["m"], shape["n"]),
    }
    is_operand = group in OPERANDS and operand in OPERANDS[group]
    rows, cols = sizes.get(operand, (None, None)) if is_operand or group == "cache" else (None, None)
    if rows is None or cols is None or value == "off":
        return ()
    common: tuple[str, ...] = (
        CACHE_FORMATS if group == "cache" else WEIGHT_FORMATS if operand == "w" else OPERAND_FORMATS
    )
    if group == "wgrad":  # it sums over tokens, so its groups lie along them
        common = tuple(Format.parse(text).transposed.text for text in common)
    texts = dict.fromkeys([value, *(o for o in others if o != "off"), *common])
    return tuple(Cost(text, Format.parse(text).size_bytes(rows, cols), text == value) for text in texts)


# --- text -------------------------------------------------------------------------------------------------------------


def explanation_text(found: Sequence[Explanation]) -> str:
    return "\n\n".join("\n".join(_lines(e)) for e in found)


def _lines(e: Explanation) -> list[str]:
    layers = f"  (the same in {len(e.layers)} layers: {ranges(e.layers)})" if len(e.layers) > 1 else ""
    lines = [e.key + layers]
    for graph, line, saved in e.nodes:
        lines.append(f"  {graph}: {line.partition('   # ')[0]}")
        lines += [f"    saved for backward: {saved}"] if saved else []
    if e.op not in ("section", "node"):
        lines.append("  " + " · ".join([e.op, *dict.fromkeys(e.words)]))
    if e.shape and e.shape[1] is not None:
        sizes = " x ".join("?" if s is None else f"{s:,}" for s in e.shape)
        lines.append(f"  m x n x k = {sizes}" + (f", {e.experts} experts" if e.experts > 1 else ""))
    if e.param:
        lines.append(f"  weight {e.param}")
    if e.source:
        lines.append(f"  at {e.source}")
    lines += [f"  no {which}: {why}" for which, why in e.missing.items()]
    last: Because | None = None
    told: set[str] = set()
    for answer in e.answers:
        b = answer.because
        if b != last:
            lines += ["", f"  {b.place}  rule {b.rule} of {b.spec}"]
            lines += [f"      {b.text}"] if b.text else []
            if b.because and b.rule not in told:
                lines += textwrap.wrap(b.because, 100, initial_indent="      because ", subsequent_indent="        ")
                told.add(b.rule)
            last = b
        lines.append(f"    {answer.field} = {answer.value}" + _cost_text(answer))
        lines += [f"        over {v}: rule {o.rule}, {o.place}" for v, o in answer.overrode]
    return lines


def _cost_text(answer: Answer) -> str:
    if not answer.costs:
        return ""
    own = next(c.size_bytes for c in answer.costs if c.chosen)
    others = ", ".join(f"{c.format} {size(c.size_bytes)}" for c in answer.costs if not c.chosen)
    return f"  {size(own)}; {others}"


def size(size_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:,.2f} {unit}"
    return f"{size_bytes} B"


def ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
