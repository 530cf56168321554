"""Machines: the shipped ones are whole, a user's file is checked, an unknown name is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.backends import target as targets
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.specs.vocabulary import ARCHITECTURES, GROUP_WORDS, SCALES


@pytest.mark.parametrize("name", targets.names())
def test_shipped_machine_is_whole(name: str) -> None:
    record = targets.load_target(name)
    assert record.name == name and record.architecture in ARCHITECTURES
    assert record.sources and all(record.sources)
    assert record.scales <= set(SCALES)
    assert {"128x1", "1x128", "128x128"} <= record.groups
    assert all(g in GROUP_WORDS or g.replace("x", "").isdigit() for g in record.groups)
    if record.architecture != "cpu":
        assert record.fp8_tflops == pytest.approx(2 * record.bf16_tflops, rel=0.01)
        assert record.hbm_tb_per_s > 0 and record.nvlink_gb_per_s > record.nic_gb_per_s
    assert record.is_truncating == (record.architecture == "sm90")


@pytest.mark.parametrize(
    ("name", "help"),
    [("h20", "h200"), ("sm90", "h100, h200, h800"), ("H2OO", "h200"), ("zzz", "b200, cpu, h100, h200, h800")],
)
def test_unknown_machine_names_the_near_ones(name: str, help: str) -> None:
    with pytest.raises(DiagnosticError) as e:
        targets.load_target(name)
    (found,) = e.value.diagnostics
    assert found.code == "E0406" and help in found.help
    assert e.value.exit_code is ExitCode.TARGET


def _own(folder: Path, *changes: tuple[str, str]) -> Path:
    text = (Path(targets.__file__).parent / "targets" / "h200.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_own_machine_is_read_from_a_path(tmp_path: Path) -> None:
    record = targets.load_target(_own(tmp_path, ("sms = 132", "sms = 100")))
    assert (record.name, record.sms, record.architecture) == ("mine", 100, "sm90")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("sms = 132", "", "lacks sms"),
        ("sms = 132", "sms = 132\ncolour = 1", "has unknown colour"),
        ("sms = 132", 'sms = "many"', "sms is 'many'; expected int"),
        ("sms = 132", "sms = true", "sms is True"),
        ("sms = 132", "sms = -1", "not negative"),
        ("sms = 132", "sms = ", "not a target file"),
        ('accumulator = "truncating"', 'accumulator = "magic"', 'accumulator is "fp32" or "truncating"'),
        ('schema = "fp8c.target/1"', "", "expected `schema"),
        ("native_scaling = []", "native_scaling = [1]", "native_scaling is [1]"),
    ],
)
def test_own_machine_with_a_mistake_is_rejected(tmp_path: Path, old: str, new: str, text: str) -> None:
    with pytest.raises(DiagnosticError) as e:
        targets.load_target(_own(tmp_path, (old, new)))
    (found,) = e.value.diagnostics
    assert found.code == "E0408" and text in found.message
    assert e.value.exit_code is ExitCode.TARGET


def test_file_that_is_not_there_is_a_diagnostic() -> None:
    with pytest.raises(DiagnosticError) as e:
        targets.load_target("nowhere/x.toml")
    assert [d.code for d in e.value.diagnostics] == ["E0406"]
