"""Model references: what loads, and what a person reads when it doesn't."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, render
from fp8c.error_codes import EXPLANATIONS
from fp8c.models import StepModule, check_step, load_model, parse_overrides

GOOD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x, labels=None):
        return self.linear(x)

def model(width=8):
    return Net(width)

def example_inputs(batch=2):
    return {"x": torch.randn(batch, 8), "labels": torch.ones(batch, dtype=torch.long)}

def loss(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs, batch["labels"])
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Write a file into a folder of its own, which is the current one; returns its path as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "model.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text).lstrip())
        return name

    return write


def refused(reference: str, **options: object) -> Diagnostic:
    with pytest.raises(DiagnosticError) as caught:
        loaded = load_model(reference, **options)  # type: ignore[arg-type]
        check_step(loaded)
    (found,) = caught.value.diagnostics
    assert caught.value.exit_code is ExitCode.MODEL
    assert found.code in EXPLANATIONS
    return found


def test_a_file_with_a_loss_function(write: object) -> None:
    loaded = load_model(write(GOOD))  # type: ignore[operator]
    assert loaded.name == "model" and loaded.source == "model.py" and loaded.module.training
    want = loaded.loss(loaded.module(loaded.example_inputs["x"]), loaded.example_inputs)  # type: ignore[misc]
    assert torch.equal(loaded.step()(loaded.example_inputs), want)
    assert check_step(loaded) == pytest.approx(float(want.detach()))


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state(write: object) -> None:
    reference = write(GOOD)  # type: ignore[operator]
    state = torch.get_rng_state()
    first, again, other = load_model(reference, seed=1), load_model(reference, seed=1), load_model(reference, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.module.get_parameter("linear.weight") for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_factory_overrides_and_sizes(write: object) -> None:
    reference = write(GOOD.replace("def model(", "def wide("))  # type: ignore[operator]
    loaded = load_model(f"{reference}:wide", overrides=parse_overrides(["width=16"]), batch=3)
    assert loaded.module.linear.out_features == 16  # type: ignore[union-attr]
    assert loaded.example_inputs["x"].shape == (3, 8)


def test_a_module_of_the_current_folder(write: object) -> None:
    write(GOOD, "own_models.py")  # type: ignore[operator]
    assert load_model("own_models:model").name == "own_models"
    sys.modules.pop("own_models")


def test_a_file_imports_its_neighbours_and_no_path_stays_behind(write: object) -> None:
    write("WIDTH = 8", "neighbour_of_model.py")  # type: ignore[operator]
    path = list(sys.path)
    load_model(write("import neighbour_of_model\n" + textwrap.dedent(GOOD)))  # type: ignore[operator]
    assert sys.path == path
    sys.modules.pop("neighbour_of_model")


def test_what_a_model_prints_is_no_result(write: object, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(write("print('building')\n" + textwrap.dedent(GOOD)))  # type: ignore[operator]
    captured = capsys.readouterr()
    assert captured.out == "" and "building" in captured.err


def test_a_batch_on_the_meta_device_for_a_model_without_weights(write: object) -> None:
    loaded = load_model(write(GOOD), weights="meta")  # type: ignore[operator]
    assert loaded.module.linear.weight.is_meta and loaded.example_inputs["x"].is_meta  # type: ignore[union-attr]
    assert check_step(loaded) is None
    assert loaded.step()(loaded.example_inputs).is_meta


def test_check_step_leaves_buffers_as_they_were(zoo: ModuleType) -> None:
    loaded = zoo.load("example")
    before = {name: buffer.clone() for name, buffer in loaded.module.named_buffers()}
    assert check_step(loaded) is not None
    assert all(torch.equal(before[name], buffer) for name, buffer in loaded.module.named_buffers())


def test_step_takes_tuples_and_single_tensors() -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return {"loss": x.sum() + (0.0 if y is None else y.sum())}

    step = StepModule(Sum())
    ones = torch.ones(3)
    assert float(step((ones, ones))) == 6.0 and float(step(ones)) == 3.0


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def test_a_model_type_with_overrides(zoo: ModuleType) -> None:
    loaded = zoo.load("qwen3_moe", num_hidden_layers=2, batch=3, seq=32)
    assert loaded.module.config.num_hidden_layers == 2 and loaded.module.config.head_dim == 32
    assert loaded.example_inputs["input_ids"].shape == (3, 32)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}


def test_the_real_deepseek_v3_comes_without_weights() -> None:
    loaded = load_model("hf:deepseek_v3", seq=16)
    assert loaded.weights == "meta" and all(p.is_meta for p in loaded.module.parameters())
    assert sum(p.numel() for p in loaded.module.parameters()) == 671_026_404_352
    assert loaded.module.config.num_hidden_layers == 61  # type: ignore[union-attr]


def test_a_configuration_file_and_its_folder(tmp_path: Path, zoo: ModuleType) -> None:
    values = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **zoo.CONFIGS["mixtral"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for reference in (f"hf:{tmp_path}", f"hf:{tmp_path / 'config.json'}"):
        loaded = load_model(reference)
        assert type(loaded.module).__name__ == "MixtralForCausalLM" and loaded.name == tmp_path.name
        assert loaded.module.config.num_local_experts == 8  # type: ignore[union-attr]


def test_overrides_are_literals() -> None:
    assert parse_overrides(["a=4", "b=gelu", "c=[1, 2]", "d=None", "e=1e-3"]) == {
        "a": 4,
        "b": "gelu",
        "c": [1, 2],
        "d": None,
        "e": 1e-3,
    }


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, str, str]] = [
    (
        "no-model",
        """
        import torch
        def make_model():
            return torch.nn.Linear(8, 8)
        """,
        """
        model.py: error[E0802]: model.py has no model()
           = note: functions and classes found: make_model
           = help: add `def model():` that returns the torch.nn.Module, or name a factory: model.py:make_model
        """,
    ),
    (
        "no-example-inputs",
        """
        import torch
        def model():
            return torch.nn.Linear(8, 8)
        """,
        """
        model.py: error[E0804]: model.py has no example_inputs()
           = note: functions and classes found: model
           = help: add `def example_inputs():` that returns one batch, e.g. {'tokens': ..., 'labels': ...}
        """,
    ),
    (
        "model-raises",
        """
        import torch
        def model():
            sizes = {"hidden": 8}
            return torch.nn.Linear(8, sizes["hiden"])
        """,
        """
        model.py:4:31: error[E0803]: model() raised KeyError: 'hiden'
           |
         4 |     return torch.nn.Linear(8, sizes["hiden"])
           |                               ^^^^^^^^^^^^^^
        """,
    ),
    (
        "raises-inside-torch",
        """
        import torch
        def model():
            return torch.nn.Linear(8, -1)
        """,
        """
        model.py:3:12: error[E0803]: model() raised RuntimeError: Trying to create tensor with negative dimension -1: [-1, 8]
           |
         3 |     return torch.nn.Linear(8, -1)
           |            ^^^^^^^^^^^^^^^^^^^^^^
           = note: raised in torch/nn/modules/linear.py:LINE, in __init__
        """,
    ),
    (
        "syntax-error",
        """
        def model(:
            return 1
        """,
        """
        model.py:1:11: error[E0803]: importing model.py raised SyntaxError: invalid syntax (model.py, line 1)
           |
         1 | def model(:
           |           ^
        """,
    ),
    (
        "missing-import",
        """
        import package_that_is_not_there
        """,
        """
        model.py:1:1: error[E0803]: importing model.py raised ModuleNotFoundError: No module named 'package_that_is_not_there'
           |
         1 | import package_that_is_not_there
           | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
        """,
    ),
    (
        "exits",
        """
        import sys
        sys.exit(3)
        """,
        """
        model.py:2:1: error[E0808]: importing model.py ended the process with SystemExit(3), expected it to return
           |
         2 | sys.exit(3)
           | ^^^^^^^^^^^
           = help: put command-line code under `if __name__ == '__main__':`; fp8c only needs the functions
        """,
    ),
    (
        "exits-for-good",
        """
        import os
        def model():
            os._exit(139)
        """,
        """
        model.py:3:5: error[E0808]: model() ended the process with os._exit(139), expected it to return
           |
         3 |     os._exit(139)
           |     ^^^^^^^^^^^^^
           = help: put command-line code under `if __name__ == '__main__':`; fp8c only needs the functions
        """,
    ),
    (
        "no-module",
        """
        def model():
            return {"layers": 4}
        def example_inputs():
            return {}
        """,
        """
        model.py:1:1: error[E0811]: model() returned a dict of 1, expected a torch.nn.Module
           |
         1 | def model():
           | ^^^^^^^^^
           = help: return the module (or the pair of module and example inputs)
        """,
    ),
    (
        "no-tensor",
        """
        import torch
        def model():
            return torch.nn.Linear(8, 8)
        def example_inputs():
            return {"x": 8}
        """,
        """
        model.py:4:1: error[E0812]: example_inputs() returned a dict of 1 without a tensor
           |
         4 | def example_inputs():
           | ^^^^^^^^^^^^^^^^^^
           = help: return a dict of keyword arguments for the model's forward, or a tuple of positional ones
        """,
    ),
    (
        "no-loss",
        """
        import torch
        class Net(torch.nn.Module):
            def forward(self, x):
                return x * 2
        def model():
            return Net()
        def example_inputs():
            return {"x": torch.ones(4, 8)}
        """,
        """
        model.py:3:5: error[E0805]: the model returned a tensor float32[4, 8] as the loss, expected a floating-point scalar
           |
         3 |     def forward(self, x):
           |     ^^^^^^^^^^^
           = help: return the loss from forward when it is given labels, or define `loss(outputs, batch)` next to model()
        """,
    ),
    (
        "forward-raises",
        """
        import torch
        class Net(torch.nn.Module):
            def forward(self, x):
                return (x @ x).sum()
        def model():
            return Net()
        def example_inputs():
            return {"x": torch.ones(4, 8)}
        """,
        """
        model.py:4:17: error[E0803]: the forward pass on example_inputs() raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)
           |
         4 |         return (x @ x).sum()
           |                 ^^^^^
        """,
    ),
]


@pytest.mark.parametrize(("name", "text", "want"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_files_are_refused_with_this_text(write: object, name: str, text: str, want: str) -> None:
    got = render(refused(write(text)))  # type: ignore[operator]
    for line in got.splitlines():
        assert "fp8c/" not in line
    got = re.sub(r"linear.py:\d+", "linear.py:LINE", got)
    assert got == textwrap.dedent(want).strip("\n")


def test_references_that_name_nothing(write: object) -> None:
    write(GOOD, "my_model.py")  # type: ignore[operator]
    assert render(refused("my_modle.py")) == (
        "error[E0801]: no model file 'my_modle.py'\n   = help: did you mean my_model.py?"
    )
    assert refused("no_such_package.module:make").code == "E0801"
    assert refused("hf:no/such/folder").code == "E0801"
    assert refused("hf:missing.json").code == "E0801"
    assert refused("what is this?").code == "E0810"


def test_model_types_are_suggested() -> None:
    found = refused("hf:deepseekv3")
    assert found.code == "E0807" and "hf:deepseek_v3" in found.help
    assert refused("hf:vit").code == "E0807"  # no language model


@pytest.mark.parametrize(
    ("text", "code", "column"),
    [('{"model_type": "llama",}', "E0813", 24), ('{"hidden_size": 4}', "E0813", 0), ("[]", "E0813", 0)],
)
def test_bad_configurations(tmp_path: Path, text: str, code: str, column: int) -> None:
    (tmp_path / "config.json").write_text(text)
    found = refused(f"hf:{tmp_path}")
    assert found.code == code
    assert (found.span.column if found.span else 0) == column


def test_code_from_a_repository_is_never_run(tmp_path: Path) -> None:
    values = {"model_type": "their_own", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    assert refused(f"hf:{tmp_path}").code == "E0814"


def test_overrides_that_nothing_reads(write: object) -> None:
    found = refused("hf:llama", overrides={"num_hidden_layer": 2})
    assert found.code == "E0809" and "num_hidden_layers" in found.help
    found = refused(write(GOOD), overrides={"widht": 2})  # type: ignore[operator]
    assert found.code == "E0809" and found.help == "did you mean width?"
    assert refused("model.py", seq=4).code == "E0809"
    with pytest.raises(DiagnosticError, match="E0809"):
        parse_overrides(["layers"])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else real(name))
    found = refused("hf:llama")
    assert found.code == "E0806" and "pip install" in found.help


def test_a_forked_child_of_a_model_still_exits(write: object) -> None:
    """os._exit is only softened in fp8c's own process: a data loader's workers must be able to end."""
    reference = write(  # type: ignore[operator]
        """
        import os, torch
        def model():
            child = os.fork()
            if child == 0:
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            return torch.nn.Linear(8, 8)
        def example_inputs():
            return torch.ones(8)
        def loss(outputs, batch):
            return outputs.sum()
        """
    )
    script = f"from fp8c.models import load_model; load_model({reference!r}); print('loaded')"
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root}, check=False)
    assert done.stdout == "loaded\n", done.stderr
