"""Training beside BF16: the arms get the same seeds and batches, and the figure is what the docstring says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fp8c.tools import train_compare as t

TINY = str(Path(__file__).parent / "models" / "tiny.py")


def test_the_arms_train_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gaps.json"
    assert t.main([TINY, "--steps", "12", "--seeds", "2", "--json", str(out)]) == 0
    gaps = json.loads(out.read_text())["gaps"]
    assert set(gaps) == {t.FP8C, t.REORDERED}
    # BF16 against itself differs by the order of sums alone; FP8 by more, but both learn the same.
    assert all(abs(v) < 0.05 for gap in gaps.values() for v in gap["values"])
    assert gaps[t.FP8C]["values"][0] != 0
    text = capsys.readouterr().out
    assert "seed 1" in text and "standard error over 2 seeds" in text


def test_both_arms_learn() -> None:
    settings = t.Settings(TINY, steps=12, lr=1e-2, warmup=2)
    for arm in (t.BF16, t.FP8C):
        losses = list(t.train(settings, 0, arm))
        assert losses[-1] < losses[0] - 0.2, arm


def test_the_same_seed_gives_the_same_losses() -> None:
    settings = t.Settings(TINY, steps=3)
    assert list(t.train(settings, 3, t.BF16)) == list(t.train(settings, 3, t.BF16))
    assert list(t.train(settings, 3, t.BF16)) != list(t.train(settings, 4, t.BF16))


def test_the_figure_is_the_last_fifth() -> None:
    assert t.final_loss([9.0] * 8 + [1.0, 3.0]) == 2.0
    gap = t.Gap((0.01, 0.03))
    assert gap.mean == pytest.approx(0.02)
    assert gap.standard_error == pytest.approx(0.01)  # stdev 0.01414 over sqrt(2)
    assert math.isnan(t.Gap((0.01,)).standard_error)


def test_reordering_keeps_the_step() -> None:
    batch = {"a": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0)}
    turned = t.reversed_order(batch)
    assert turned["a"].tolist() == [[4, 5], [2, 3], [0, 1]] and turned["scale"] == 2


def test_a_model_without_batches_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(TINY).read_text()
    (tmp_path / "m.py").write_text(source[: source.index("def batches")])
    assert t.main([str(tmp_path / "m.py"), "--steps", "1"]) == 4
    assert "error[E0804]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--steps", "0"), ("--seeds", "0"), ("--json", "/dev/null/gaps.json")], ids=" ".join
)
def test_what_would_train_nothing_or_lose_the_gaps_is_refused(
    options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        t.main([TINY, *options])
    assert caught.value.code == 2 and options[0] in capsys.readouterr().err
