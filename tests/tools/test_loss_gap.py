"""The loss gap: which runs and steps it compares, what it prints, and the figure."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8c.specs.load import load
from fp8c.tools import loss_figure, loss_gap, loss_run
from fp8c.tools.loss_gap import Runs, gap, gradient_report, read_runs, record_of, report
from fp8c.tools.loss_run import Run, Setup
from fp8c.tools.rounded_gemms import Errors
from fp8c.tools.train_compare import Gap

ROOT = Path(__file__).parents[2]


def runs_of(lengths: dict[tuple[str, int], int], excess: float = 0.01) -> Runs:
    """Losses that fall; every variant but BF16 lies above it by `excess`."""
    return {
        (variant, seed): [
            (2.0 + math.exp(-i / 50)) * (1.0 if variant == "bf16" else 1.0 + excess) for i in range(length)
        ]
        for (variant, seed), length in lengths.items()
    }


def test_seed_by_seed_over_steps_that_three_seeds_reached() -> None:
    lengths = {("bf16", s): 100 for s in range(4)} | {
        ("spec", 0): 100,
        ("spec", 1): 90,
        ("spec", 2): 80,
        ("spec", 3): 50,
    }
    found, steps = gap(runs_of(lengths), "spec")
    assert steps == 80 and len(found.values) == 3
    assert all(abs(value - 0.01) < 1e-12 for value in found.values) and found.standard_error < 1e-12
    assert gap(runs_of(lengths), "blocks") == (Gap(()), 0)


def test_runs_are_read_by_setup_and_a_later_record_replaces_an_earlier_one(tmp_path: Path) -> None:
    setup = Setup(steps=3, size="100m")
    path = tmp_path / "runs.jsonl"
    first = record_of(setup, "bf16", 0, Run([3.0, 2.0]))
    second = record_of(setup, "bf16", 0, Run([3.0, 2.0, 1.0]))
    other = record_of(Setup(steps=3), "bf16", 1, Run([1.0, 1.0, 1.0]))
    for field in ("size", "corpus"):  # as records were before there were sizes
        del other["setup"][field]
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, second, other)))
    assert read_runs(path, setup) == {("bf16", 0): [3.0, 2.0, 1.0]}
    assert list(read_runs(path, Setup(steps=3))) == [("bf16", 1)]


def test_the_report_says_what_can_be_told_apart() -> None:
    runs = runs_of({(v, s): 50 for v in ("bf16", "spec", "blocks") for s in range(3)})
    runs["spec", 0] = [x * 0.95 for x in runs["spec", 0]]
    text = report(runs)
    assert "spec against BF16" in text and "not distinguishable from 0" in text and "50 steps" in text
    assert "128x128 gradients against 1x128" in text


def test_the_gradients_of_finished_runs_are_averaged_over_seeds() -> None:
    def record(variant: str, seed: int, dy: float) -> dict[str, Any]:
        errors = {"linears": {"1x128": Errors(dy, 0.02, 0.0, 0.03, 0.04)}, "experts": {}}
        errors["experts"]["1x128"] = Errors(dy, 0.02, 0.0, None, None)
        return record_of(Setup(), variant, seed, Run([1.0], gradients=errors))

    records = [record("bf16", 0, 0.01), record("bf16", 1, 0.02), record("spec", 0, 0.5)]
    text = gradient_report(json.loads(json.dumps(records)))
    assert "2 finished BF16 runs" in text and text.count("1.500%") == 2 and "4.000%" in text
    assert gradient_report([]) == ""


BRANCHED = dict(steps=3750, shared=750, batch=16, lr=3e-4, warmup=200)
SCRATCH = dict(steps=3000, batch=8, lr=6e-4, warmup=100)


@pytest.mark.parametrize(("file", "changes"), [("100m_h200_shared", BRANCHED), ("100m_h200", SCRATCH)])
def test_the_results_in_the_repository_are_those_the_page_states(file: str, changes: dict[str, Any]) -> None:
    setup = Setup(size="100m", corpus="all", length=256, device="cuda", **changes)
    found, steps = gap(read_runs(ROOT / f"tools/bench/results/loss_gap_{file}.jsonl", setup), "spec")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{100 * found.mean:+.2f} % ± {100 * found.standard_error:.2f} %" in page and f"{steps:,} steps" in page
    assert ", ".join(f"{100 * value:+.2f}" for value in found.values) in page


@pytest.mark.parametrize("variant", loss_run.SPECS)
def test_every_variants_spec_is_one(variant: str) -> None:
    with loss_run.spec_file(Setup(), variant) as path:
        assert load(path).digest != load("deepseek_v3").digest


def test_batches_are_the_same_whatever_comes_before() -> None:
    corpus = torch.arange(1000, dtype=torch.int64).to(torch.uint8)
    setup = Setup(steps=5, batch=2, length=8)
    one, two = loss_run.Batches(corpus, setup, 3), loss_run.Batches(corpus, setup, 3)
    one.at(0)
    assert torch.equal(one.at(4)["tokens"], two.at(4)["tokens"])
    assert torch.equal(one.at(1)["tokens"][:, 1:], one.at(1)["labels"][:, :-1])


def test_the_figure_holds_every_variant_and_is_well_formed(tmp_path: Path) -> None:
    runs = runs_of({(v, s): 600 for v in ("bf16", "spec") for s in range(3)})
    path, out = tmp_path / "runs.jsonl", tmp_path / "figure.svg"
    records = [record_of(Setup(steps=600), variant, seed, Run(losses)) for (variant, seed), losses in runs.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert loss_figure.main([str(path), "-o", str(out)]) == 0
    root = ElementTree.parse(out).getroot()
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 3  # two curves and a gap
    rows = loss_figure.gaps(runs, "spec")
    assert [x for x, _, _ in rows] == [250, 500] and all(abs(y - 1.0) < 1e-9 for _, y, _ in rows)


@pytest.mark.slow
def test_runs_in_parallel_end_in_one_file(tmp_path: Path) -> None:
    setup = Setup(steps=2, batch=2, length=128, dim=128, n_layers=1, n_experts=2)
    out = tmp_path / "runs.jsonl"
    loss_gap.run_parallel(setup, [("bf16", 0), ("bf16", 1)], 2, out, 600.0, tmp_path / "starts")
    runs = read_runs(out, setup)
    assert sorted(runs) == [("bf16", 0), ("bf16", 1)] and all(len(losses) == 2 for losses in runs.values())
    assert asdict(setup)["steps"] == 2


def test_the_figure_compares_the_seeds_that_have_come_far_enough(tmp_path: Path) -> None:
    lengths = {("bf16", s): 600 for s in range(5)} | {("spec", s): 600 for s in range(1, 4)}
    runs = runs_of(lengths | {("spec", 4): 250, ("forward", 0): 600})
    kept = loss_figure.counted(runs)
    assert ("spec", 4) not in kept and ("forward", 0) in kept
    shared = loss_figure.in_common(kept)
    assert {s for _, s in shared} == {1, 2, 3} and {v for v, _ in shared} == {"bf16", "spec"}
    text = loss_figure.draw(runs)
    assert "BF16, 3 seeds" in text and "fprop alone in FP8, 1 seed<" in text
    assert text.count("<polyline") == 4  # two curves, two gaps


@pytest.mark.slow
def test_variants_branch_off_one_run(tmp_path: Path) -> None:
    setup = Setup(steps=4, shared=2, batch=2, length=128, dim=128, n_layers=1, n_experts=2)

    def run(variant: str) -> Run:
        torch._dynamo.reset()
        return loss_run.train(setup, variant, 0, print, starts=tmp_path)

    bf16, again, spec = run("bf16"), run("bf16-again"), run("spec")
    assert len(bf16.losses) == len(spec.losses) == 4
    assert again.losses == bf16.losses, "a CPU repeats its sums: moments, masters and schedule have come over"
    assert spec.losses[:2] == bf16.losses[:2] and spec.losses[2] != bf16.losses[2]
    assert all(abs(a / b - 1) < 2.0**-8 for a, b in zip(spec.losses, bf16.losses))
