"""`fp8c compile` and `fp8c opt` as a user meets them: output, exit codes, and what bad input leaves behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fp8c import cli
from fp8c.build import read_build

TINY = str(Path(__file__).parent / "tools" / "models" / "tiny.py")
PLAN_ONLY = ("--target", "cpu", "--no-baseline")

Output = tuple[int, str, str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Output:
        capsys.readouterr()
        code = cli.main(["compile", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def model_file(folder: Path, body: str, name: str = "model.py") -> str:
    head = "import torch\nfrom torch import nn\n"
    (folder / name).write_text(head + body)
    return name


# --- what works -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "build"
    assert cli.main(["compile", TINY, "--target", "cpu", "-o", str(out)]) == 0
    return out


def test_json_holds_what_machines_read(run: Any, tmp_path: Path) -> None:
    code, out, _ = run(TINY, "--target", "cpu", "--verify", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == "fp8c.compile/1"
    assert (document["model"], document["spec"], document["target"]) == (TINY, "deepseek_v3", "cpu")
    for which in ("fprop", "dgrad", "wgrad"):
        assert document["gemms"][which] == {"total": 7, "fp8": 6, "kept": 1}
    assert 0 < document["saved_bytes"]["fp8c"] < document["saved_bytes"]["bf16"]
    assert [row["layer"] for row in document["saved_bytes"]["layers"]] == [0, 1, None]
    verified = document["verify"]
    assert verified["ok"] and verified["same_graphs"]
    assert verified["gemms_ran"] == verified["gemms_planned"] == verified["gemms_checked"] == 18
    assert 0 < verified["loss_rel_err"] < 2**-4 and 0 < verified["grad_rel_err_median"] <= verified["grad_rel_err_max"]
    assert 0 < verified["fp64_worst_ratio"] <= 1
    assert document["build"] == "build" and (tmp_path / "build" / "manifest.json").is_file()


def test_a_build_holds_its_files_and_hashes(built: Path) -> None:
    build = read_build(built)
    assert {"plan.lock.json", "report.json", "spec/std/deepseek_v3.fp8"} <= set(build.manifest["files"])
    assert build.manifest["plan"] and build.manifest["spec"]["sha256"]
    assert "aten.mm" in build.graph_text("captured") and "fp8c.scaled_mm" not in build.graph_text("captured")
    for name in ("joint", "forward", "backward"):
        assert "fp8c.scaled_mm" in build.graph_text(name)
    lock = build.json("plan.lock.json")
    assert lock["uses"]["layers.0.gate"]["fields"]["fprop.x"]["reason"]["rule"] == "gemm_fp8"


def test_no_file_of_a_build_names_the_machine(built: Path) -> None:
    own = str(Path(__file__).parent.parent)
    for name in read_build(built).manifest["files"]:
        assert own not in (built / name).read_text().replace(TINY, "")  # what was typed is kept


def test_tables_go_to_stdout(run: Any) -> None:
    code, out, err = run(TINY, *PLAN_ONLY, "--time-passes")
    assert code == 0
    assert re.search(r"^fprop +7 +6 +1$", out, re.M)
    assert re.search(r"^insert-quantize +18 ", err, re.M)
    assert "report: build/report.html" in out


def test_a_width_that_is_no_multiple_of_128_is_said(run: Any) -> None:
    code, out, _ = run(TINY, *PLAN_ONLY, "-a", "width=200", "-a", "layers=1")
    assert code == 0
    assert "remark[R0411]: layers.0.gate (k = 200) and 2 more: no multiple of 128" in out


def test_or_kept_when_the_spec_says_so(run: Any, tmp_path: Path) -> None:
    (tmp_path / "kept.fp8").write_text(
        'version 1;\nuse "std:deepseek_v3" as base;\nspec kept extends base { override pad { partial_group = keep; } }\n'
    )
    code, out, err = run(TINY, *PLAN_ONLY, "-a", "width=200", "-a", "layers=1", "--spec", "kept.fp8")
    assert code == 0, err
    assert "R0402" in out
    assert re.search(r"^fprop +4 +0 +4$", out, re.M)


SPLIT = """
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 128, 128, dtype=torch.bfloat16))

    def forward(self, x):
        rows = int((x[:, 0] > 0).sum())
        torch._check(0 <= rows)
        torch._check(rows <= len(x))
        first, second = x[:rows], x[rows:]
        return torch.cat([first @ self.weight[0], second @ self.weight[1]]).tanh()


def model():
    return nn.Sequential(nn.Linear(128, 128), Experts()).bfloat16()


def example_inputs():
    return (torch.randn(64, 128, dtype=torch.bfloat16),)


def loss(outputs, batch):
    return outputs.float().square().mean()
"""


def test_saved_bytes_that_rest_on_unknown_sizes_are_said(run: Any, tmp_path: Path) -> None:
    code, out, err = run(model_file(tmp_path, SPLIT), *PLAN_ONLY)
    assert code == 0, err
    assert re.search(
        r"warning\[W0847\]: \d+ of \d+ saved tensors have sizes that are known in the step alone \(1: ", out
    )
    code, out, _ = run(TINY, *PLAN_ONLY)
    assert code == 0 and "W0847" not in out


def test_graphs_are_printed_around_passes(run: Any, tmp_path: Path) -> None:
    code, _, err = run(
        TINY, *PLAN_ONLY, "--print-ir-before", "insert-quantize", "--print-ir-after-change", "--dump-dir", "dumps"
    )
    assert code == 0
    titles = re.findall(r"^// ----- IR (.*) -----$", err, re.M)
    assert titles[:2] == ["after fuse-head-loss", "before insert-quantize"]
    assert "after insert-quantize" in titles and "after assign-roles" not in titles
    dumped = sorted(p.name for p in (tmp_path / "dumps").iterdir())
    assert dumped[0] == "00-assign-roles.txt" and any(n.endswith("compress-saved-backward.txt") for n in dumped)


def test_opt_prints_the_graph_after_named_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["opt", TINY, "--passes", "assign-roles,insert-quantize", "--target", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("graph tiny\n") and "fp8c.quantize" in out and "fp8c.requantize" not in out
    assert cli.main(["opt", TINY, "--passes", "insert-quantize", "--target", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "E0702" in err and "run assign-roles first" in err
    assert cli.main(["opt", TINY, "--passes", "insert-quantise", "--target", "cpu"]) == 2
    assert "did you mean 'insert-quantize'?" in capsys.readouterr().err


# --- bad input: one diagnostic, its exit code, nothing written --------------------------------------------------------


def expect_failure(result: Output, code: int, *texts: str) -> None:
    found, out, err = result
    assert found == code, err
    assert out == ""
    for text in texts:
        assert text in err
    assert err.count("error[") == 1
    assert "Traceback" not in err
    assert not Path("build").exists()


def test_no_model_function(run: Any, tmp_path: Path) -> None:
    name = model_file(tmp_path, "def make_model():\n    return nn.Linear(1, 1)\n")
    expect_failure(
        run(name, *PLAN_ONLY), 4, "error[E0802]: model.py has no model()", "name a factory: model.py:make_model"
    )


def test_no_such_file(run: Any) -> None:
    expect_failure(run("nowhere.py", *PLAN_ONLY), 4, "error[E0801]: no model file 'nowhere.py'")


def test_a_model_that_raises(run: Any, tmp_path: Path) -> None:
    body = (
        "class Broken(nn.Linear):\n    def forward(self, x):\n        raise ValueError('wrong shape')\n\n"
        "def model():\n    return Broken(8, 8)\n\ndef example_inputs():\n    return (torch.ones(8, 8),)\n"
    )
    name = model_file(tmp_path, body)
    expect_failure(run(name, *PLAN_ONLY), 4, "model.py:5:9: error[E0803]", "ValueError: wrong shape")


def test_a_graph_break(run: Any, tmp_path: Path) -> None:
    body = (
        "class Branches(nn.Linear):\n    def forward(self, x):\n        y = super().forward(x)\n"
        "        if y.sum() > 0:\n            y = y * 2\n        return y.square().mean()\n\n"
        "def model():\n    return Branches(128, 128)\n\ndef example_inputs():\n    return (torch.ones(8, 128),)\n"
    )
    name = model_file(tmp_path, body)
    expect_failure(run(name, *PLAN_ONLY), 4, "model.py:6: error[E0833]: graph break:", "   = help: ")


def test_a_misspelt_spec(run: Any) -> None:
    expect_failure(run(TINY, *PLAN_ONLY, "--spec", "deepseek_v4"), 3, "error[E0603]", "deepseek_v3")


def test_a_spec_with_a_typo(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.fp8").write_text("version 1;\nformat act = e4m4 [1x128] scale fp32 online;\nspec mine { }\n")
    expect_failure(run(TINY, *PLAN_ONLY, "--spec", "mine.fp8"), 3, "mine.fp8:2:14: error[", "^^^^")


def test_an_unknown_target(run: Any) -> None:
    expect_failure(run(TINY, "--target", "h2000"), 5, "error[E0406]: unknown target `h2000`", "did you mean `h200`?")


def test_an_empty_batch(run: Any) -> None:
    code, _, err = run(TINY, *PLAN_ONLY, "--batch", "0")
    assert code == 2 and "Invalid value for '--batch'" in err
    assert not Path("build").exists()


def test_example_inputs_without_a_token(run: Any, tmp_path: Path) -> None:
    body = "def model():\n    return nn.Linear(8, 8)\n\ndef example_inputs():\n    return {'input': torch.ones(0, 8)}\n"
    name = model_file(tmp_path, body)
    expect_failure(run(name, *PLAN_ONLY), 4, "error[E0816]: the batch is empty: example_inputs()['input'] is f32[0, 8]")


def test_no_loss(run: Any, tmp_path: Path) -> None:
    body = "def model():\n    return nn.Linear(8, 8)\n\ndef example_inputs():\n    return {'input': torch.ones(4, 8)}\n"
    name = model_file(tmp_path, body)
    expect_failure(run(name, *PLAN_ONLY), 4, "error[E0805]", "loss(outputs, batch)")


def test_paths_that_are_no_text(run: Any, tmp_path: Path) -> None:
    name, out = os.fsdecode(b"m\xff.py"), os.fsdecode(b"b\xff")
    (tmp_path / name).write_text("def model():\n    raise ValueError\n")
    expect_failure(run(name, *PLAN_ONLY), 4, "error[E0810]", "is no UTF-8 text")
    assert run(TINY, *PLAN_ONLY, "-o", out)[0] == 0
    assert cli.main(["inspect", out, "-o", os.fsdecode(b"p\xff.html")]) == 0


def test_an_output_path_that_cannot_be_written(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    expect_failure(run(TINY, *PLAN_ONLY, "-o", "file/build"), 2, "error[E0610]: cannot write the build to 'file/build'")
    expect_failure(run(TINY, *PLAN_ONLY, "-o", "file"), 2, "error[E0611]: 'file' would be replaced, but it is a file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_foreign_folder(run: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.c").write_text("int main;")
    expect_failure(run(TINY, *PLAN_ONLY, "-o", "src"), 2, "error[E0611]", "--force")
    assert (tmp_path / "src" / "main.c").read_text() == "int main;"


def test_an_unknown_override(run: Any) -> None:
    expect_failure(run(TINY, *PLAN_ONLY, "-a", "widht=8"), 4, "error[E0809]", "did you mean width?")


def test_verify_without_weights(run: Any) -> None:
    expect_failure(run(TINY, *PLAN_ONLY, "--verify", "--weights", "meta"), 4, "error[E0840]", "use --weights random")


def test_an_unknown_pass(run: Any) -> None:
    expect_failure(
        run(TINY, *PLAN_ONLY, "--print-ir-after", "insert-quantise"),
        2,
        "error[E0701]",
        "did you mean 'insert-quantize'?",
    )


def test_a_failing_pass_leaves_a_reproducer(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.passes.insert_quantize import InsertQuantize

    def broken(self: Any, graph: Any, ctx: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(InsertQuantize, "run", broken)
    code, out, err = run(TINY, *PLAN_ONLY)
    assert (code, out) == (70, "")
    assert "reproducer in fp8c-repro-001/" in err and "bug in fp8c" in err
    place = tmp_path / "fp8c-repro-001"
    assert (place / "passes.txt").read_text() == (
        "assign-roles\ncausal-attention\ngather-gradients\nfuse-head-loss\ninsert-quantize\n"
    )
    assert "aten.mm" in (place / "graph-before.txt").read_text()
    assert (place / "model.py").read_text() == Path(TINY).read_text()
    assert (place / "spec" / "std" / "deepseek_v3.fp8").is_file()
    assert (place / "command.txt").read_text().startswith("fp8c compile ")
    assert "a bug of ours" in (place / "error.txt").read_text()
    assert not (tmp_path / "build").exists()
    assert run(TINY, *PLAN_ONLY)[0] == 70
    assert (tmp_path / "fp8c-repro-002").is_dir()
