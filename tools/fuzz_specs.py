"""Throw broken specs at the language: nothing but a diagnostic may come out.

    python -m fp8c.tools.fuzz_specs --inputs 1000000

An input is one to three statements of good specs, cut, doubled, swapped, misspelt, or with another's piece inside; some
were never a spec. Every input is loaded. What loads is formatted, which must read back as the same and be its own layout,
and now and then resolved on a model; what does not is asked about as an editor does. A run is repeated by its seed.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError
from fp8c.roles import Op, OpUse
from fp8c.specs import parser
from fp8c.specs.editing import Document
from fp8c.specs.formatter import format_source
from fp8c.specs.load import load_source, loads, shipped, shipped_text
from fp8c.specs.resolve import resolve
from fp8c.target_record import TargetRecord

#: A model small enough to resolve every tenth spec on.
USES = tuple(
    OpUse(path, op, path, frozenset({kind}), frozenset(roles), layer, 2, f"{path}.weight", 64, 256, 256)
    for path, op, kind, roles, layer in (
        ("model.layers.0.up", Op.LINEAR, "mlp", {"mlp_up"}, 0),
        ("model.layers.1.experts", Op.GROUPED_MM, "moe", {"moe_up"}, 1),
        ("lm_head", Op.LINEAR, "lm_head", set[str](), None),
    )
)
_MARKS = '(){}[];"/@&|!?,.=<>%#\\'
_ODD = "\0\ufeff\u2028é𝔘\r\t'`$~0123456789"


@dataclass
class Result:
    """How many inputs there were, how many of them loaded, and which codes the others got."""

    inputs: int = 0
    loaded: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Unexpected(AssertionError):
    """Something other than a diagnostic came out, or a property does not hold. `text` is the input."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}\n--- input ---\n{text!r}")
        self.text = text


#: Statements that are whole: above a spec, and inside one.
ABOVE = (
    "format act = e4m3 [1x128] scale fp32 online rne;",
    "format act = e4m3 [32x1] scale e8m0;",
    "format late = e5m2 [tensor] scale fp32 delayed(history = 16, algo = max, margin = 0);",
    "format kept = act;",
    "set s = kind(mlp?) | role(mlp_up);",
    "set t = @s & !op(bmm?);",
)
INSIDE = (
    "rule r for op(linear) & !kind(router?) { precision = bf16; }",
    "rule q for layers(0..1) | all { fprop { x = act; w = act; } }",
    "override rule p for shape(k % 128 == 0 and n >= 1) { cache x as act retile [128x1]; }",
    'optional rule g for "model.layers.*.{up,gate}"? | param("**.weight") | /lm_.*/ { recompute out; }',
    'final rule f for @s { wgrad { x = act; dy = bf16; promote_every = 128; out = fp32; } because "why"; }',
    "dispatch { payload = bf16; }",
    "override schedule { comm_sms = 24; pipeline = dualpipe; }",
    "expect op(linear) matches >= 1;",
    "target sm90, cpu requires k % 16 == 0 and n >= 1;",
)


def fragments() -> list[str]:
    """Pieces of the shipped specs between `;`, `{` and `}`, with their marks: whole statements or not."""
    found: dict[str, None] = {}
    for name in shipped():
        text = re.sub(r"#[^\n]*", "", shipped_text(name))
        for piece in re.findall(r"[^;{}]+[;{}]", text):
            found[" ".join(piece.split())] = None
    return [*found, *ABOVE, *INSIDE]


def inputs(count: int, seed: int) -> Iterator[str]:
    """Texts of specs, most of them broken."""
    rng = random.Random(seed)
    pieces = fragments()
    words = sorted({word for piece in pieces for word in re.findall(r"\w+", piece)})
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:  # short ones first of all: a mistake needs no long text, and more of them fit into a minute
            text = f"version 1;{rng.choice(ABOVE)}"
        elif kind < 0.6:
            text = f"version 1;spec a{{{rng.choice(INSIDE)}}}"
        elif kind < 0.7:
            text = f"version 1;{ABOVE[0]}{ABOVE[4]}spec a{{{''.join(rng.choices(INSIDE, k=rng.choice((1, 2))))}}}"
        else:
            text = f"version 1;{' '.join(rng.choices(pieces, k=rng.choice((1, 1, 2))))}"
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            text = mutate(text, rng, pieces, words)
        yield text


def mutate(text: str, rng: random.Random, pieces: Sequence[str], words: Sequence[str]) -> str:
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice((1, 1, 3, 12, 40)))
    match rng.randrange(8):
        case 0:
            return text[:at] + text[end:]
        case 1:
            return text[:end] + text[at:]
        case 2:
            return text[:at] + rng.choice(_MARKS) * rng.choice((1, 1, 2)) + text[end:]
        case 3:
            other = rng.choice(pieces)
            cut = rng.randrange(len(other) + 1)
            return text[:at] + other[cut : cut + rng.randint(1, 40)] + text[end:]
        case 4:
            return text[:at] + text[at:end][::-1] + text[end:]
        case 5:
            return text[:at] + rng.choice(words) + text[at:]
        case 6:  # a word becomes another, or is misspelt
            found = list(re.finditer(r"\w+", text))
            if not found:
                return text
            word = rng.choice(found)
            new = rng.choice((rng.choice(words), word[0][::-1], word[0][1:], word[0] * 2, str(rng.getrandbits(40))))
            return text[: word.start()] + new + text[word.end() :]
        case _:
            deep = rng.choice("([{!") * 150 if rng.random() < 0.02 else rng.choice(_ODD)
            return text[:at] + deep + text[at:]


def check_one(text: str, result: Result, target: TargetRecord) -> None:
    """Raises: Unexpected when anything but a plan, a tree or diagnostics comes out."""
    number = result.inputs
    result.inputs += 1
    try:
        source = parser.source_of(text, "fuzz.fp8")
        loaded = load_source(source, None)
    except DiagnosticError as e:
        if not e.diagnostics or not all(d.code and d.message for d in e.diagnostics):
            raise Unexpected("a rejection without a reason", text) from e
        result.codes.update({d.code for d in e.diagnostics})
        if number % 50 == 0:
            ask_as_editor(text)
        return
    result.loaded += 1
    printed = format_source(source)
    if number % 10 == 0:
        again = parser.source_of(printed, "fuzz.fp8")
        if format_source(again) != printed:
            raise Unexpected("formatting is not idempotent", text)
        load_source(again, None)
        if not hasattr(loaded, "layers"):
            return
        try:
            resolve(loads(text, "fuzz.fp8"), USES, target)
        except DiagnosticError as e:
            result.codes.update({d.code for d in e.diagnostics})


def ask_as_editor(text: str) -> None:
    try:
        source = parser.source_of(text, "fuzz.fp8")
    except DiagnosticError:
        source = parser.Source("fuzz.fp8", "fuzz.fp8", text)
    document = Document(source, None)
    lines = text.split("\n")
    for column in range(1, len(lines[0]) + 2, 7):
        document.hover(1, column)
        document.completions(1, column)


def fuzz(count: int, seed: int = 0) -> Result:
    """Check `count` inputs. Raises: Unexpected with the input that shows a bug."""
    result, target, started = Result(), load_target("cpu"), time.perf_counter()
    for text in inputs(count, seed):
        try:
            check_one(text, result, target)
        except Unexpected:
            raise
        except Exception as error:  # what this is for
            raise Unexpected(f"{type(error).__name__}: {error}", text) from error
    result.seconds = time.perf_counter() - started
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="fuzz_specs", description=(__doc__ or "").splitlines()[0])
    options.add_argument("--inputs", type=int, default=50_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    try:
        result = fuzz(given.inputs, given.seed)
    except Unexpected as found:
        print(found, file=sys.stderr)
        return 1
    print(f"{result.inputs} inputs, {result.loaded} loaded, {len(result.codes)} codes, {result.seconds:.0f} s")
    print(", ".join(f"{code} {count}" for code, count in sorted(result.codes.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
