"""Text of any kind gives a tree or a diagnostic: limits, encodings, files that use files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.formats import BF16
from fp8c.specs import parser
from fp8c.specs.check import MAX_DIAGNOSTICS
from fp8c.specs.load import load, load_file, loads


def codes(text: str) -> list[str]:
    with pytest.raises(DiagnosticError) as e:
        loads(text)
    assert e.value.exit_code is ExitCode.SPEC
    return [d.code for d in e.value.diagnostics]


@pytest.mark.parametrize("char", ["\0", "\x1b", "\x7f", "\ud800"])
def test_characters_that_are_no_text_are_rejected_where_they_stand(char: str) -> None:
    with pytest.raises(DiagnosticError) as e:
        loads(f"version 1;\nset a{char} = all;")
    (found,) = e.value.diagnostics
    assert found.code == "E0103" and found.span is not None
    assert (found.span.line, found.span.column) == (2, 6)


def test_bytes_that_are_no_utf8_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.fp8"
    path.write_bytes(b"version 1;\n# \xff\n")
    with pytest.raises(DiagnosticError) as e:
        load(path)
    assert [(d.code, d.span and d.span.line) for d in e.value.diagnostics] == [("E0103", 2)]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.fp8"
    path.write_bytes(b"\xef\xbb\xbfversion 1;\r\nspec a { }\r\n")
    assert load(path).name == "a"


def test_file_of_more_than_a_mebibyte_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.fp8"
    path.write_bytes(b"version 1;\n" + b"#" * parser.MAX_BYTES)
    with pytest.raises(DiagnosticError) as e:
        load(path)
    assert [d.code for d in e.value.diagnostics] == ["E0104"]


@pytest.mark.parametrize(
    ("opening", "closing"), [("(", ")"), ("[", "]"), ("a {", "}"), ("(", ""), ("", ")"), ("a {", ""), ("!(", ")")]
)
@pytest.mark.parametrize("depth", [101, 20_000])
def test_deep_nesting_is_a_diagnostic_not_a_crash(opening: str, closing: str, depth: int) -> None:
    found = codes("version 1;\nset a = " + opening * depth + "all" + closing * depth + ";")
    assert set(found) <= {"E0101", "E0104"}


def test_nesting_of_a_hundred_is_read() -> None:
    loads("version 1; set a = " + "(" * 100 + "all" + ")" * 100 + "; spec s { }")
    assert codes("version 1; set a = " + "(" * 101 + "all" + ")" * 101 + "; spec s { }") == ["E0104"]


def test_many_negations_are_read_without_recursion() -> None:
    spec = loads("version 1; spec s { rule r for " + "!" * 9_999 + "op(linear) { precision = bf16; } }")
    assert type(spec.layers[0].rules[0].selector).__name__ == "Not"


def test_sets_that_use_sets_too_deep_are_a_diagnostic() -> None:
    chain = "".join(f"set s{i} = @s{i + 1} & @s{i + 1};\n" for i in range(500))
    assert "E0104" in codes(f"version 1;\n{chain}set s500 = all;\nspec a {{ rule r for @s0 {{ precision = bf16; }} }}")


def test_doubling_sets_stay_small() -> None:
    chain = "".join(f"set s{i} = @s{i + 1} & @s{i + 1};\n" for i in range(40))
    spec = loads(f"version 1;\n{chain}set s40 = all;\nspec a {{ rule r for @s0 {{ precision = bf16; }} }}")
    assert spec.layers[0].rules[0].name == "r"


def test_long_chains_of_formats_and_many_mistakes_stay_cheap() -> None:
    chain = "".join(f"format f{i} = f{i + 1};\n" for i in range(3000))
    spec = loads(f"version 1;\n{chain}format f3000 = bf16;\nspec a {{ combine {{ payload = f0; }} }}")
    assert spec.layers[0].sections[0].fields[0].value == BF16
    assert len(codes("version 1;\n" + "x;\n" * 5000)) == MAX_DIAGNOSTICS


def test_chain_of_used_files_is_bounded(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"f{i}.fp8").write_text(f'version 1; use "f{i + 1}.fp8"; spec s{i} extends f{i + 1} {{ }}')
    (tmp_path / "f20.fp8").write_text("version 1; spec last { }")
    with pytest.raises(DiagnosticError) as e:
        load(tmp_path / "f0.fp8")
    assert [d.code for d in e.value.diagnostics] == ["E0604"]
    assert load(tmp_path / "f5.fp8").layers[0].name == "last"


def test_files_are_found_below_the_folder_of_the_spec_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.fp8"
    (inside / "lib").mkdir(parents=True)
    outside.write_text("version 1; spec out { }")
    (inside / "lib" / "link.fp8").symlink_to(outside)
    (inside / "lib" / "b.fp8").write_text('version 1; use "../c.fp8"; spec b extends c { }')
    (inside / "c.fp8").write_text("version 1; spec c { }")
    spec = inside / "a.fp8"
    spec.write_text('version 1; use "lib/b.fp8"; spec a extends b { }')
    assert [layer.name for layer in load(spec).layers] == ["c", "b", "a"]
    assert load(spec).layers[1].file == "lib/b.fp8", "locks name files the same way on every machine"
    for path in ("../out.fp8", "lib/link.fp8", str(outside), "lib/../../out.fp8"):
        spec.write_text(f'version 1; use "{path}" as x; spec a extends x {{ }}')
        with pytest.raises(DiagnosticError) as e:
            load(spec)
        assert [d.code for d in e.value.diagnostics] == ["E0601"], path


def test_text_without_a_folder_uses_shipped_specs_only() -> None:
    assert loads('version 1; use "std:bf16"; spec a extends bf16 { }').name == "a"
    assert codes('version 1; use "bf16.fp8"; spec a extends bf16 { }') == ["E0601"]


def test_two_files_may_use_the_same_third(tmp_path: Path) -> None:
    (tmp_path / "f.fp8").write_text("version 1; format act = e4m3 [1x128] scale fp32;")
    (tmp_path / "a.fp8").write_text('version 1; use "f.fp8"; format a = f.act; set s = all;')
    (tmp_path / "b.fp8").write_text(
        'version 1; use "f.fp8" as g; use "a.fp8"; spec b { dispatch { payload = a.a; } combine { payload = g.act; } }'
    )
    spec = load(tmp_path / "b.fp8")
    assert len({field.value for section in spec.layers[0].sections for field in section.fields}) == 1


def test_digest_is_that_of_the_text_not_of_its_place(tmp_path: Path) -> None:
    digests = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "a.fp8"
        path.write_bytes(b"version 1;\n" + (b"\r\n" if folder == "two" else b"\n") + b"spec a { }\n")
        digests.append(load(path).digest)
    assert digests[0] == digests[1]


def test_library_file_can_be_checked_alone(tmp_path: Path) -> None:
    path = tmp_path / "lib.fp8"
    path.write_text("version 1; format act = e4m3 [1x128] scale fp32; format b = ac;")
    with pytest.raises(DiagnosticError) as e:
        load_file(path)
    assert [d.code for d in e.value.diagnostics] == ["E0202"]
