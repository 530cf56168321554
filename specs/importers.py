"""Specs from what other tools use: `fp8c spec import`. No torch here.

Known sources: recipe names of Transformer Engine (`te:Float8BlockScaling`) and torchao (`torchao:rowwise`), a Hugging Face
`config.json` with a `quantization_config`, and Megatron's `--te-precision-config-file` YAML. The result is the text of a
spec; what cannot be said in one is an error (E0605), never left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.files import reason
from fp8c.specs import formatter, parser
from fp8c.specs.load import loads
from fp8c.specs.vocabulary import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Formats of the three GEMMs. `x`, `w` and `dy` are those of fprop and dgrad; `x_t`, `w_t` and `dy_t` run along the
    other axis, for wgrad and, for weights whose groups are not square, dgrad."""

    x: str
    w: str
    dy: str
    x_t: str
    w_t: str
    dy_t: str
    promote_every: int
    source: str

    def formats(self, prefix: str) -> list[str]:
        return [f"format {prefix}{name} = {getattr(self, name)};" for name in ("x", "w", "dy", "x_t", "w_t", "dy_t")]

    def body(self, prefix: str) -> str:
        """The statements of a rule. The copy for backward is made from BF16, so that nothing is rounded twice."""
        promote = f" promote_every = {self.promote_every};" if self.promote_every else ""
        p = prefix
        return f"""
            fprop {{ x = {p}x; w = {p}w; accumulate = fp32;{promote} out = bf16; }}
            dgrad {{ dy = {p}dy; w = {p}w_t; accumulate = fp32;{promote} out = bf16; }}
            wgrad {{ x = {p}x_t; dy = {p}dy_t; accumulate = fp32;{promote} out = fp32; }}
            cache x as {p}x_t;
            because "{self.source}";"""


def _grouped(along: str, across: str, block: str, scale: str, promote_every: int, source: str) -> Recipe:
    x, x_t = f"e4m3 [{along}] scale {scale} online", f"e4m3 [{across}] scale {scale} online"
    w, w_t = (f"e4m3 [{b}] scale {scale} online" for b in ((block, block) if block else (along, across)))
    return Recipe(x, w, x, x_t, w_t, x_t, promote_every, source)


def blockwise(scale: str, source: str) -> Recipe:
    """1x128 tiles of activations, 128x128 blocks of weights."""
    return _grouped("1x128", "128x1", "128x128", scale, 128, source)


def _tensorwise(backward: str, timing: str, source: str) -> Recipe:
    forward, gradient = (f"{e} [tensor] scale fp32 {timing}" for e in ("e4m3", backward))
    return Recipe(forward, forward, gradient, forward, forward, gradient, 128, source)


_DELAYED = "delayed(history = 1024, algo = max, margin = 0)"
TRANSFORMER_ENGINE = {
    "Float8BlockScaling": blockwise("pow2", "Transformer Engine, Float8BlockScaling: power-of-two scales by default"),
    "MXFP8BlockScaling": _grouped("1x32", "32x1", "", "e8m0", 0, "Transformer Engine, MXFP8BlockScaling"),
    "Float8CurrentScaling": _tensorwise("e5m2", "online", "Transformer Engine, Float8CurrentScaling, Format.HYBRID"),
    "DelayedScaling": _tensorwise("e5m2", _DELAYED, "Transformer Engine, DelayedScaling, Format.HYBRID"),
}
TORCHAO = {
    "tensorwise": _tensorwise("e5m2", "online", "torchao, Float8LinearConfig recipe tensorwise"),
    "rowwise": _grouped("row", "col", "", "pow2", 128, "torchao, Float8LinearConfig recipe rowwise"),
}
#: `fp8_quantization_recipe` of Megatron's configs.
MEGATRON = {
    "blockwise": TRANSFORMER_ENGINE["Float8BlockScaling"],
    "mxfp8": TRANSFORMER_ENGINE["MXFP8BlockScaling"],
    "tensorwise": TRANSFORMER_ENGINE["Float8CurrentScaling"],
    "delayed": TRANSFORMER_ENGINE["DelayedScaling"],
}


def import_spec(source: str, name: str, default: str = "bf16", skip: Sequence[str] = ()) -> str:
    """The text of a spec called `name` that says what `source` says.

    default: what Megatron's YAML leaves to the command line: a recipe for modules that no matcher names
    skip:    torchtitan's `filter_fqns`: modules whose path contains one of these stay in BF16
    Raises:  DiagnosticError E0605 for what is no known source, or says what a spec cannot.
    """
    kind, _, recipe = source.partition(":")
    if kind == "te" and recipe:
        text = _single(name, _known(recipe, TRANSFORMER_ENGINE, "recipe of Transformer Engine"), skip)
    elif kind == "torchao" and recipe:
        text = _single(name, _known(recipe, TORCHAO, "recipe of torchao"), skip)
    elif source.endswith(".json"):
        text = _hugging_face(name, _read_json(Path(source)), source, skip)
    elif source.endswith((".yaml", ".yml")):
        text = _megatron(name, _read_yaml(Path(source)), default, source)
    else:
        raise _error(
            f"cannot tell what `{source}` is",
            help="write te:RECIPE, torchao:RECIPE, a config.json of Hugging Face or a precision YAML of Megatron",
        )
    formatted = formatter.format_source(parser.source_of(text, f"{name}.fp8"))
    loads(formatted, f"{name}.fp8")  # what is handed out checks, or this is a bug
    return formatted


def _error(message: str, place: str = "", help: str = "") -> DiagnosticError:
    return fail("E0605", message, span=Span(place) if place else None, help=help, exit_code=ExitCode.SPEC)


def _known(name: str, recipes: Mapping[str, Recipe], what: str) -> Recipe:
    if name not in recipes:
        raise _error(f"`{name}` is no {what} that a spec can say", help=did_you_mean(name, recipes))
    return recipes[name]


_HIGH = "kind(embedding?, lm_head?, router?, norm?) | op(attention?, bmm?)"


def _spec(name: str, doc: str, formats: Iterable[str], high: str, rules: Iterable[str], tokens_to: int) -> str:
    lines = "\n".join(formats)
    operators, experts = "linear?, grouped_mm?", ""
    if re.search(r"\[(row|col|tensor)\]", lines):
        # Along tokens such a group would span experts, and each expert needs scales of its own.
        operators = "linear?"
        experts = "optional rule experts for op(grouped_mm) { precision = bf16; wgrad { out = fp32; }"
        experts += ' because "one scale for a column or a tensor would be shared by experts"; }'
    return f"""version 1;

{lines}

set high_precision = {high};
set gemms = op({operators}) & !@high_precision;

## {doc}
spec {name} {{
  defaults {{ unmatched_rule = error; undecided_gemm = error; }}

  rule keep_high for @high_precision {{ precision = bf16; }}
  {experts} {" ".join(rules)}

  pad {{ tokens_to = {tokens_to}; empty_expert = skip; partial_group = pad; }}
}}
"""


def _single(name: str, recipe: Recipe, skip: Sequence[str]) -> str:
    high = " | ".join([_HIGH, *(f"/.*{_regex(part)}.*/" for part in skip)])
    rule = f"rule gemms for @gemms {{ {recipe.body('')} }}"
    return _spec(name, recipe.source, recipe.formats(""), high, [rule], 32 if "1x32" in recipe.x else 128)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def _hugging_face(name: str, config: Any, place: str, skip: Sequence[str]) -> str:
    """`quantization_config` of a checkpoint in block-wise FP8, such as DeepSeek-V3's."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        raise _error("the file has no `quantization_config`", place)
    method = quantization.get("quant_method")
    if method != "fp8":
        raise _error(f"quant_method is {method!r}; a spec can say `fp8`", place)
    if quantization.get("weight_block_size") != [128, 128] or quantization.get("activation_scheme") != "dynamic":
        raise _error(
            "expected weight_block_size [128, 128] and activation_scheme dynamic, found "
            f"{quantization.get('weight_block_size')} and {quantization.get('activation_scheme')}",
            place,
        )
    scales = {None: "fp32", "float": "fp32", "ue8m0": "e8m0"}
    scale_format = quantization.get("scale_fmt")
    if scale_format not in scales:
        raise _error(f"scale_fmt is {scale_format!r}; expected float or ue8m0", place)
    recipe = blockwise(scales[scale_format], "Hugging Face quantization_config: fp8, 128x128 blocks, dynamic")
    kept = [*(quantization.get("modules_to_not_convert") or ()), *skip]
    if not all(isinstance(k, str) and k for k in kept):
        raise _error("modules_to_not_convert is not a list of names", place)
    # Names there are prefixes, suffixes or whole paths; structure covers lm_head and norms already.
    named = [f'"**.{k}.**"' for k in kept if re.fullmatch(r"[\w.\-]+", k)]
    named += [f"/{_regex_body(k, place)}/" for k in kept if not re.fullmatch(r"[\w.\-]+", k)]
    rule = f"rule gemms for @gemms {{ {recipe.body('')} }}"
    return _spec(name, recipe.source, recipe.formats(""), " | ".join([_HIGH, *named]), [rule], 128)


def _regex_body(text: str, place: str) -> str:
    if "\n" in text:
        raise _error("a name in modules_to_not_convert spans lines", place)
    return text.replace("/", r"\/")


# -- Megatron ----------------------------------------------------------------------------------------------------------


def _megatron(name: str, config: Any, default: str, place: str) -> str:
    """`--te-precision-config-file`: named configs, and ordered globs of which the first that matches wins."""
    configs = config.get("configs") if isinstance(config, dict) else None
    matchers = config.get("matchers") if isinstance(config, dict) else None
    if not isinstance(configs, dict) or not isinstance(matchers, dict):
        raise _error("expected mappings `configs` and `matchers`", place)
    chosen = {key: _megatron_recipe(key, value, place) for key, value in configs.items()}
    if default not in (*MEGATRON, "bf16"):
        raise _error(
            f"no recipe `{default}` for modules without a matcher", help=did_you_mean(default, (*MEGATRON, "bf16"))
        )
    formats: list[str] = []
    prefixes: dict[str, str] = {}
    for key in dict.fromkeys([default, *(recipe for recipe in chosen.values())]):
        if key != "bf16":
            prefixes[key] = f"{key}_"
            formats += MEGATRON[key].formats(prefixes[key])
    rules: list[str] = []
    earlier: list[str] = []
    for index, (matcher, value) in enumerate(matchers.items()):
        if (
            not isinstance(value, dict)
            or value.get("type", "glob") != "glob"
            or not isinstance(value.get("pattern"), str)
        ):
            raise _error(f"matcher `{matcher}` is not a glob with a pattern", place)
        if not value.get("enabled", True):
            continue
        if value.get("config") not in chosen:
            raise _error(
                f"matcher `{matcher}` names no config: {value.get('config')!r}",
                place,
                did_you_mean(str(value.get("config")), chosen),
            )
        pattern = f"/{_fnmatch(value['pattern'])}/"
        selector = " & ".join(["@gemms", pattern, *(f"!{e}" for e in earlier)])
        rules.append(
            f"rule m{index}_{_word(str(matcher))} for {selector} {{ {_megatron_body(chosen[value['config']], prefixes)} }}"
        )
        earlier.append(f"{pattern}?")
    rest = " & ".join(["@gemms", *(f"!{e}" for e in earlier)])
    rules.append(f"optional rule unmatched for {rest} {{ {_megatron_body(default, prefixes)} }}")
    tokens_to = 32 if {"mxfp8"} >= prefixes.keys() else 128
    return _spec(name, "Megatron te-precision-config-file: the first matcher wins.", formats, _HIGH, rules, tokens_to)


def _megatron_recipe(key: str, value: Any, place: str) -> str:
    recipe = value.get("training_recipe") if isinstance(value, dict) else None
    if not isinstance(recipe, dict):
        raise _error(f"config `{key}` has no training_recipe", place)
    if recipe.get("fp4_quantization_recipe") or recipe.get("custom_recipe_factory"):
        raise _error(f"config `{key}` asks for FP4 or a custom recipe, which a spec cannot say", place)
    found = recipe.get("fp8_quantization_recipe")
    if found is None:
        return "bf16"
    if found not in MEGATRON:
        raise _error(f"config `{key}`: no recipe `{found}`", place, did_you_mean(str(found), MEGATRON))
    is_hybrid = recipe.get("fp8_format", "e4m3") == "hybrid"
    if is_hybrid != (found in ("tensorwise", "delayed")) and "fp8_format" in recipe:
        raise _error(f"config `{key}`: {found} with fp8_format {recipe['fp8_format']} is not known here", place)
    return str(found)


def _megatron_body(recipe: str, prefixes: Mapping[str, str]) -> str:
    if recipe == "bf16":
        return "precision = bf16; wgrad { out = fp32; }"
    return MEGATRON[recipe].body(prefixes[recipe])


def _word(text: str) -> str:
    return re.sub(r"\W", "_", text, flags=re.ASCII)


def _fnmatch(pattern: str) -> str:
    """Python's fnmatch, which Megatron uses, as a regular expression: `*` crosses dots."""
    out, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        close = pattern.find("]", at + 2) if char == "[" else -1
        if char == "[" and close > 0:
            inner = pattern[at + 1 : close].replace("\\", r"\\")
            out += "[" + ("^" + inner[1:] if inner.startswith("!") else inner) + "]"
            at = close
        else:
            out += {"*": ".*", "?": "."}.get(char, _regex(char))
        at += 1
    return out


# -- files -------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise _error(f"cannot read the file: {reason(e)}", str(path)) from None
    if len(text) > parser.MAX_BYTES:
        raise _error("the file is larger than 1 MiB", str(path))
    return text


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise _error(f"not JSON: {reason(e)}", str(path)) from None


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise _error("reading YAML needs the package PyYAML", str(path), help="pip install pyyaml") from None
    try:
        return yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, RecursionError) as e:
        raise _error(f"not YAML: {e}", str(path)) from None
