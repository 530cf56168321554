"""Load a model from a reference: a Python file, a module's factory, or a Hugging Face configuration. Never a download.

    model.py                    defines model() and example_inputs(), optionally loss(outputs, batch)
    model.py:factory            another function of the file instead of model()
    package.module:factory      a factory of an importable module
    hf:config.json, hf:folder   a Hugging Face configuration on this machine
    hf:deepseek_v3              the configuration class's own defaults

What comes back is the module and one batch; `StepModule` turns the two into a training step with a scalar loss.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.files import reason
from fp8c.user_code import short_path, user_code

Weights = Literal["auto", "random", "meta"]
Batch = Any  # a dict of keyword arguments, a tuple of positional ones, or the one argument
LossFunction = Callable[[Any, Batch], Tensor]

#: With weights="auto" a Hugging Face model above this many parameters (4 GB in BF16) is built without weights.
AUTO_META_PARAMETERS = 2_000_000_000


@dataclass(frozen=True)
class LoadedModel:
    """A model and one batch of its training step.

    loss: maps (outputs, batch) to the scalar loss; None when the model returns its loss itself
    name: short, for file names and tables;  source: the reference, which loads the same model again
    weights: "meta" when the module (and the batch) hold shapes only
    """

    module: nn.Module
    example_inputs: Batch
    loss: LossFunction | None
    name: str
    source: str
    weights: Literal["random", "meta"] = "random"

    def step(self) -> StepModule:
        return StepModule(self.module, self.loss, source=self.source)


class StepModule(nn.Module):
    """One training step's forward: `step(batch)` is the scalar loss.

    The loss is, in this order, `loss(outputs, batch)`, the outputs' `.loss` or `["loss"]`, or the outputs themselves
    when they are a scalar tensor. With a `loss` function, batch entries the model's forward doesn't name (labels) are
    for that function alone.
    """

    def __init__(self, module: nn.Module, loss: LossFunction | None = None, *, source: str = "") -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self.source = source
        parameters = inspect.signature(module.forward).parameters.values()
        takes_all = loss is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._accepted = None if takes_all else frozenset(p.name for p in parameters)

    def forward(self, batch: Batch) -> Tensor:
        outputs = self.call(batch)
        if self.loss is not None:
            return self._checked(self.loss(outputs, batch), "loss()")
        if isinstance(outputs, Tensor):
            return self._checked(outputs, "the model")
        found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if found is None:
            raise self._no_loss(f"{type(self.module).__name__} returned {describe(outputs)} without a loss")
        return self._checked(found, "the model")

    def call(self, batch: Batch) -> Any:
        """The model's own outputs for the batch."""
        if isinstance(batch, Mapping):
            kept = {k: v for k, v in batch.items() if self._accepted is None or k in self._accepted}
            return self.module(**kept)
        if isinstance(batch, tuple | list):
            return self.module(*batch)
        return self.module(batch)

    def _checked(self, loss: Any, who: str) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise self._no_loss(f"{who} returned {describe(loss)} as the loss, expected a floating-point scalar")
        return loss if loss.ndim == 0 else loss.reshape(())

    def _no_loss(self, message: str) -> DiagnosticError:
        return fail(
            "E0805",
            message,
            span=_forward_span(self.module) or (Span(self.source) if self.source else None),
            help="return the loss from forward when it is given labels, or define `loss(outputs, batch)` next to model()",
            exit_code=ExitCode.MODEL,
        )


def check_step(loaded: LoadedModel) -> float | None:
    """Run the step once without gradients and return the loss; None for a model without weights.

    Buffers and the random state are as before afterwards.
    Raises: DiagnosticError E0803 when the model raises, E0805 when there is no scalar loss.
    """
    if loaded.weights == "meta":
        return None
    step = loaded.step()
    saved = {name: buffer.clone() for name, buffer in loaded.module.named_buffers()}
    try:
        with torch.no_grad(), _seeded(0), user_code("the forward pass on example_inputs()", loaded.source):
            return float(step(loaded.example_inputs))
    finally:
        for name, buffer in loaded.module.named_buffers():
            if name in saved:
                buffer.data.copy_(saved[name])


def load_model(
    reference: str,
    *,
    weights: Weights = "auto",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    batch: int | None = None,
    seq: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LoadedModel:
    """Load the model a reference names, in training mode, with one batch.

    weights:    "random" under `seed`; "meta" for shapes only; "auto" is "meta" for a Hugging Face model of more than
                `AUTO_META_PARAMETERS` parameters and "random" for everything else
    overrides:  keyword arguments of the factory, or fields of the Hugging Face configuration
    batch, seq: size of a Hugging Face model's batch (1 x 128 unless said); handed on to example_inputs() of a file
    dtype:      of a Hugging Face model's parameters; a file decides itself
    Raises:     DiagnosticError E0801 to E0814, exit code MODEL.
    """
    overrides = dict(overrides or {})
    if reference.startswith("hf:"):
        return _load_hf(reference, weights, seed, overrides, batch or 1, seq or 128, dtype)
    return _load_python(reference, weights, seed, overrides, {"batch": batch, "seq": seq})


def load_namespace(reference: str) -> ModuleType:
    """The Python module behind a file or module reference, for the functions it defines beside its factory.

    Raises: DiagnosticError E0801, E0810.
    """
    target = reference.partition(".py:")[0] + ".py" if ".py:" in reference else reference.partition(":")[0]
    path = Path(target)
    with _on_path(path.resolve().parent if path.is_file() else Path.cwd()):
        return _import_file(path) if target.endswith(".py") else _import_name(target, reference)


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`["num_hidden_layers=4", "hidden_act=gelu"]` as values: Python literals, and a bare word is a string."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip().isidentifier():
            raise fail(
                "E0809",
                f"found override '{assignment}', expected name=value",
                help="write for example -a num_hidden_layers=4",
                exit_code=ExitCode.MODEL,
            )
        try:
            values[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            values[name.strip()] = text.strip()
    return values


def describe(value: Any) -> str:
    """What a value is, for a message: `a tensor bf16[4, 128, 256]`, `a tuple of 2`, `None`."""
    match value:
        case Tensor():
            return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        case None:
            return "None"
        case tuple() | list() | dict():
            return f"a {type(value).__name__} of {len(value)}"
        case _:
            return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


# --- Python files and modules -----------------------------------------------------------------------------------------


def _load_python(
    reference: str, weights: Weights, seed: int, overrides: dict[str, Any], sizes: dict[str, int | None]
) -> LoadedModel:
    target, separator, factory_name = reference.rpartition(":")
    if not separator or os.sep in factory_name or factory_name.endswith(".py"):
        target, factory_name = reference, "model"
    is_file = target.endswith(".py") or os.sep in target or Path(target).exists()
    if not is_file and not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", target):
        raise fail(
            "E0810",
            f"found model reference '{reference}', expected a .py file, module:factory or hf:NAME",
            help="write model.py, model.py:factory, package.module:factory or hf:deepseek_v3",
            exit_code=ExitCode.MODEL,
        )
    meta = weights == "meta"
    folder = Path(target).resolve().parent if is_file else Path.cwd()
    with _on_path(folder):
        namespace = _import_file(Path(target)) if is_file else _import_name(target, reference)
        shown = short_path(target) if is_file else target
        factory = _function(namespace, factory_name, shown, "E0802")
        _check_keywords(factory, overrides, f"{factory_name}()", shown)
        device = torch.device("meta") if meta else contextlib.nullcontext()
        with _seeded(seed), user_code(f"{factory_name}()", shown, extra_help=_meta_help(meta)), device:
            made = factory(**overrides)
        module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(module, nn.Module):
            raise fail(
                "E0811",
                f"{factory_name}() returned {describe(module)}, expected a torch.nn.Module",
                span=_function_span(factory),
                help="return the module (or the pair of module and example inputs)",
                exit_code=ExitCode.MODEL,
            )
        if inputs is None:
            asked = {k: v for k, v in sizes.items() if v is not None}
            make_inputs = _function(namespace, "example_inputs", shown, "E0804")
            _check_keywords(make_inputs, asked, "example_inputs()", shown)
            with _seeded(seed), user_code("example_inputs()", shown):
                inputs = make_inputs(**asked)
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(inputs)):
        raise fail(
            "E0812",
            f"example_inputs() returned {describe(inputs)} without a tensor",
            span=_function_span(getattr(namespace, "example_inputs", factory)),
            help="return a dict of keyword arguments for the model's forward, or a tuple of positional ones",
            exit_code=ExitCode.MODEL,
        )
    loss = getattr(namespace, "loss", None)
    if meta:
        inputs = _to_meta(inputs)
    return LoadedModel(
        module.train(),
        inputs,
        loss if callable(loss) else None,
        name=Path(target).stem if is_file else target.rpartition(".")[2],
        source=reference,
        weights="meta" if meta else "random",
    )


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.py")], n=3)
        raise fail(
            "E0801",
            f"no model file '{path}'" + (" (it is a folder)" if path.is_dir() else ""),
            help=f"did you mean {' or '.join(near)}?"
            if near
            else "name a .py file, or hf:NAME for a Hugging Face model",
            exit_code=ExitCode.MODEL,
        )
    try:
        place = str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise fail(
            "E0810",
            f"the path of '{path}' is no UTF-8 text, and PyTorch traces no source it cannot name",
            help="rename the file, or the folder it is in",
            exit_code=ExitCode.MODEL,
        ) from None
    # One module per path: two files called model.py must not meet in sys.modules.
    name = f"fp8c_model_{path.stem}_{hashlib.sha256(place).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise fail(
            "E0810",
            f"'{path}' is not a Python source file",
            help="name a .py file",
            exit_code=ExitCode.MODEL,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with user_code(f"importing {path.name}", short_path(str(path))):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_name(name: str, reference: str) -> ModuleType:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise fail(
            "E0801",
            f"no module '{name}' for model reference '{reference}'",
            help="name a .py file, an importable module, or hf:NAME",
            exit_code=ExitCode.MODEL,
        )
    with user_code(f"importing {name}", name):
        return importlib.import_module(name)


def _function(namespace: ModuleType, name: str, shown: str, code: str) -> Callable[..., Any]:
    found = getattr(namespace, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    own = sorted(
        key
        for key, value in vars(namespace).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == namespace.__name__
    )
    near = difflib.get_close_matches(name, own, n=1)
    notes = (f"functions and classes found: {', '.join(own)}",) if own else ()
    if code == "E0804":
        help = "add `def example_inputs():` that returns one batch, e.g. {'tokens': ..., 'labels': ...}"
    else:
        help = f"add `def {name}():` that returns the torch.nn.Module, or name a factory: {shown}:{(near or own or ['make'])[0]}"
    raise fail(
        code,
        f"{shown} has no {name}()" if found is None else f"{name} in {shown} is {describe(found)}, expected a function",
        span=Span(shown),
        notes=notes,
        help=help,
        exit_code=ExitCode.MODEL,
    )


def _check_keywords(function: Callable[..., Any], given: Mapping[str, Any], called: str, shown: str) -> None:
    """E0809 for a keyword the function doesn't take; TypeErrors from inside it stay its own."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    names = [p.name for p in parameters]
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise fail(
                "E0809",
                f"{called} of {shown} takes no argument '{key}'",
                span=_function_span(function),
                help=f"did you mean {near[0]}?" if near else f"it takes {', '.join(names) or 'no arguments'}",
                exit_code=ExitCode.MODEL,
            )


def _function_span(function: Any) -> Span | None:
    try:
        file, (lines, start) = inspect.getsourcefile(function), inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    if file is None:
        return None
    for offset, line in enumerate(lines):  # decorators come first
        if match := re.match(r"\s*(async\s+def|def|class)\s+\w+", line):
            column = len(line) - len(line.lstrip()) + 1
            return Span(short_path(file), start + offset, column, match.end() - column + 1, line.rstrip("\n"))
    return Span(short_path(file), start, 1, 1, lines[0].rstrip("\n"))


def _forward_span(module: nn.Module) -> Span | None:
    return _function_span(type(module).forward)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _load_hf(
    reference: str, weights: Weights, seed: int, overrides: dict[str, Any], batch: int, seq: int, dtype: torch.dtype
) -> LoadedModel:
    if importlib.util.find_spec("transformers") is None:
        raise fail(
            "E0806",
            f"transformers is not installed, needed for '{reference}'",
            help='pip install "transformers>=5.17,<6"',
            exit_code=ExitCode.MODEL,
        )
    name, values = _hf_values(reference)
    config = _hf_config(reference, values, overrides)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise fail(
            "E0807",
            f"'{config.model_type}' has no causal language model in transformers",
            span=Span(reference),
            help=f"did you mean {_nearest(config.model_type)}?",
            exit_code=ExitCode.MODEL,
        )
    config.use_cache = False  # a training step keeps no KV cache

    def build(device: str) -> nn.Module:
        with _seeded(seed), user_code(f"building {config.model_type}", reference), torch.device(device):
            made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return made

    if weights == "auto":
        module = build("meta")
        meta = sum(p.numel() for p in module.parameters()) > AUTO_META_PARAMETERS
        module = module if meta else build("cpu")
    else:
        meta = weights == "meta"
        module = build("meta" if meta else "cpu")
    ids = torch.randint(
        config.get_text_config().vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed)
    )
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids.clone()}
    return LoadedModel(
        module.train(),
        _to_meta(inputs) if meta else inputs,
        loss=None,
        name=name,
        source=reference,
        weights="meta" if meta else "random",
    )


def _hf_values(reference: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration values of `hf:...`; a model type alone has its class's defaults."""
    target = reference.removeprefix("hf:").strip()
    path = Path(target)
    if not target.endswith(".json") and not path.is_dir():
        if os.sep in target:
            raise fail(
                "E0801",
                f"no folder '{target}', and fp8c never downloads a model",
                help="download config.json yourself and name the file, or name a model type such as hf:deepseek_v3",
                exit_code=ExitCode.MODEL,
            )
        return target, {"model_type": target}
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except OSError as error:
        raise fail(
            "E0801",
            f"no configuration '{file}': {reason(error)}",
            help="name a Hugging Face config.json, a folder that holds one, or a model type such as hf:deepseek_v3",
            exit_code=ExitCode.MODEL,
        ) from None
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text else ""
        raise fail(
            "E0813",
            f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}",
            span=Span(str(file), error.lineno, error.colno, 1, line),
            exit_code=ExitCode.MODEL,
        ) from None
    except UnicodeDecodeError:
        raise fail("E0813", f"'{file}' is not a UTF-8 text file", exit_code=ExitCode.MODEL) from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise fail(
            "E0813",
            f"'{file}' has no \"model_type\", so it is no Hugging Face configuration",
            help="name the config.json of a model",
            exit_code=ExitCode.MODEL,
        )
    return (path if path.is_dir() else path.parent).resolve().name, values


def _hf_config(reference: str, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        remote = "auto_map" in values
        raise fail(
            "E0814" if remote else "E0807",
            f"model type '{model_type}' needs code from its repository, which fp8c never runs"
            if remote
            else f"transformers has no model type '{model_type}'",
            span=Span(reference),
            help="write the model as a model.py that imports that code"
            if remote
            else f"did you mean {_nearest(model_type)}?",
            exit_code=ExitCode.MODEL,
        )
    with user_code(f"the configuration of {model_type}", reference):
        kept = {k: v for k, v in values.items() if k not in ("model_type", "quantization_config", "auto_map")}
        config = CONFIG_MAPPING[model_type](**kept)
        known = {k for k in (*vars(config), *type(config).attribute_map) if not k.startswith("_")}
        for key in overrides:
            if key not in known and not _is_read_by_model(config, key):
                near = difflib.get_close_matches(key, known, n=3)
                raise fail(
                    "E0809",
                    f"the configuration of {model_type} has no field '{key}'",
                    span=Span(reference),
                    help=f"did you mean {' or '.join(near)}?" if near else "",
                    exit_code=ExitCode.MODEL,
                )
        if not overrides:
            return config
        # Constructing again lets derived fields (layer types, head sizes) follow the overrides.
        names = {type(config).attribute_map.get(k, k): v for k, v in overrides.items()}
        return CONFIG_MAPPING[model_type](**(kept | names))


def _is_read_by_model(config: Any, key: str) -> bool:
    """Whether the model's source reads a field its configuration class doesn't declare (`getattr(config, "head_dim")`)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    source = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
    return re.search(rf"config\.{key}\b|config,\s*[\"']{key}[\"']", source) is not None


def _nearest(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    near = difflib.get_close_matches(model_type.replace("-", "_").lower(), names, n=3, cutoff=0.5)
    return " or ".join(f"hf:{n}" for n in near or ["deepseek_v3", "qwen3_moe", "mixtral", "llama"])


# --- small parts ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random state of CPU and GPUs set to `seed` inside, as before outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """`folder` first on sys.path, as it is when Python runs a file of it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _to_meta(batch: Batch) -> Batch:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, batch)


def _meta_help(meta: bool) -> str:
    return "the model was built on the meta device, which has shapes but no values; try random weights" if meta else ""
