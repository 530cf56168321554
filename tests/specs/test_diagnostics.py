"""Every wrong spec of tests/diagnostics is rejected with the code, the line and the text that its `# E:` comments say.

    set t = kind(ruoter);    # E: E0101 unknown kind `ruoter` H: did you mean `router`?

`# E@+1:` and `# E@-1:` point at a neighbouring line, `# E@-:` at no line or one of another file, `# E@file:` at a file.
`# MODEL:` names the role records to resolve on (tests/specs/role_records.py), `# TARGET:` the machine, h200 by default.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fp8c.backends.target import load_target
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity
from fp8c.error_codes import EXPLANATIONS
from fp8c.roles import Op, OpUse
from fp8c.specs.load import STD, load, loads
from fp8c.specs.resolve import resolve
from fp8c.target_record import TargetRecord

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models

FOLDER = Path(__file__).parents[1] / "diagnostics"
FILES = sorted(FOLDER.glob("*.fp8"))
_MARK = re.compile(r"# E(?:@(?P<where>[^:]+))?: (?P<text>.*)$")

MODELS = {
    "deepseek": models.deepseek(),
    "llama": models.llama(),
    "slow_names": [OpUse("a" * 40, Op.LINEAR, "a" * 40)],
}
#: A machine with long groups and few kinds of scales, to reach checks that real ones pass.
WIDE = replace(load_target("h200"), name="wide", groups=frozenset({"1x384", "row"}), scales=frozenset({"fp32", "pow2"}))


@dataclass(frozen=True)
class Expected:
    line: int  # 0: anywhere
    file: str
    code: str
    text: str
    help: str

    def fits(self, found: Diagnostic) -> bool:
        line = found.span.line if found.span else 0
        file = Path(found.span.file).as_posix() if found.span else ""
        return (
            found.code == self.code
            and self.text in found.message
            and self.help in found.help
            and (not self.line or self.line == line)
            and file.endswith(self.file if not self.line else "")
        )


def expected(path: Path) -> list[Expected]:
    result: list[Expected] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = _MARK.search(line)
        if mark is None:
            continue
        where = mark["where"] or "+0"
        is_relative = re.fullmatch(r"[+-]\d+", where) is not None
        for part in mark["text"].split(" E: "):
            text, _, help = part.partition(" H: ")
            code, _, message = text.strip().partition(" ")
            line_number = number + int(where) if is_relative else 0
            result.append(
                Expected(line_number, "" if is_relative or where == "-" else where, code, message, help.strip())
            )
    return result


def _setting(path: Path, name: str, default: str) -> str:
    found = re.search(rf"^# {name}: (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else default


def diagnose(path: Path) -> tuple[Diagnostic, ...]:
    """All that fp8c says about a spec, warnings and remarks included."""
    try:
        spec = load(path)
        model = _setting(path, "MODEL", "")
        if not model:
            from fp8c.specs.merge import merge_sections

            return tuple(merge_sections(spec)[1])
        name = _setting(path, "TARGET", "h200")
        target: TargetRecord = WIDE if name == "wide" else load_target(name)
        return resolve(spec, MODELS[model], target).diagnostics
    except DiagnosticError as e:
        assert e.exit_code in (ExitCode.SPEC, ExitCode.TARGET)
        return e.diagnostics


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_wrong_spec_is_rejected_where_and_how_it_says(path: Path) -> None:
    wanted, found = expected(path), list(diagnose(path))
    assert wanted, "the file expects nothing"
    for want in wanted:
        match = next((d for d in found if want.fits(d)), None)
        assert match is not None, f"{want} not among:\n" + "\n".join(
            f"{d.span}: {d.code} {d.message} H: {d.help}" for d in found
        )
        found.remove(match)
    assert not found, "unexpected:\n" + "\n".join(f"{d.span}: {d.code} {d.message}" for d in found)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_carets_stand_under_something(path: Path) -> None:
    for diagnostic in diagnose(path):
        span = diagnostic.span
        if span is None or not span.column:
            continue
        pointed = (span.text + " ")[span.column - 1 : span.column - 1 + span.length]
        assert len(pointed) == span.length, diagnostic
        file = Path(span.file) if Path(span.file).exists() else STD / span.file
        assert span.text.strip() in file.read_text("utf-8")


def test_messages_follow_the_style() -> None:
    for path in FILES:
        for d in diagnose(path):
            assert not d.message.endswith("."), d
            assert d.message[0].islower() or not d.message[0].isalpha(), d
            assert "__ANON" not in d.message and "None" not in d.message, d


#: Codes of the spec language whose example is no file: (text of a test's name, code).
EXAMPLES_IN_TESTS = {
    "E0103": "test_text.py",
    "E0104": "test_text.py",
    "E0406": "test_targets.py",
    "E0408": "test_targets.py",
    "E0502": "../passes/test_choose_saved.py",
    "E0604": "test_text.py",
    "E0605": "test_importers.py",
}


def test_every_code_of_the_language_has_a_failing_example() -> None:
    ranges = re.compile(r"[EWR]0(?:[123]\d\d|40\d|50\d|60\d)|W0410")
    ours = {code for code in EXPLANATIONS if ranges.fullmatch(code)}
    shown = {e.code for path in FILES for e in expected(path)}
    for code, file in EXAMPLES_IN_TESTS.items():
        assert f'"{code}"' in (Path(__file__).parent / file).read_text("utf-8")
        shown.add(code)
    assert ours - shown == set(), "codes without an example"
    assert shown - set(EXPLANATIONS) == set(), "codes without an explanation"


def test_a_warning_alone_does_not_stop_a_plan() -> None:
    text = (FOLDER / "w0410_promotion.fp8").read_text("utf-8")
    plan = resolve(loads(text, "w.fp8"), MODELS["llama"], load_target("h200"))
    assert {d.severity for d in plan.diagnostics} == {Severity.WARNING}
