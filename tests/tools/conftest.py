"""Builds for tests of the commands that read them: made from graph texts and a real plan, without a model or torch.

`make_build(path, layers, extra)` writes one of a mixture of experts: its uses are resolved on a shipped spec, its graphs
hold every GEMM of the plan in the form fp8c writes. `extra` operators a layer make it as large as a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fp8c import build as b
from fp8c.backends.target import load_target, record_json
from fp8c.diagnostics import Span
from fp8c.roles import Op, OpUse
from fp8c.specs.load import load
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve

TOKENS, HIDDEN, INNER, EXPERTS = 256, 512, 256, 4
BuildMaker = Callable[..., Path]


def layer_uses(layer: int, layers: int) -> list[OpUse]:
    at = f"model.layers.{layer}"

    def use(name: str, op: Op, kinds: str, roles: str = "", n: int = 0, k: int = 0, **more: Any) -> OpUse:
        path, _, suffix = name.partition(":")
        is_gemm = op in (Op.LINEAR, Op.GROUPED_MM)
        return OpUse(
            f"{at}.{path}" + (f":{suffix}" if suffix else ""),
            op,
            f"{at}.{path}",
            frozenset(kinds.split()),
            frozenset(roles.split()),
            layer,
            layers,
            f"{at}.{path}.weight" if is_gemm else None,
            TOKENS if is_gemm else None,
            n if is_gemm else None,
            k if is_gemm else None,
            source=Span("lib/moe.py", 10),
            **more,
        )

    return [
        use("norm:norm", Op.NORM, "norm"),
        use("attn.q_proj", Op.LINEAR, "attention", "attn_in_proj", HIDDEN, HIDDEN),
        use("attn:attention", Op.ATTENTION, "attention"),
        use("attn.o_proj", Op.LINEAR, "attention", "attn_out_proj", HIDDEN, HIDDEN),
        use("mlp.gate", Op.LINEAR, "router", "", EXPERTS, HIDDEN),
        use("mlp.experts.up", Op.GROUPED_MM, "moe", "moe_up", 2 * INNER, HIDDEN, experts=EXPERTS),
        use("mlp.experts:swiglu", Op.SWIGLU, "moe", "moe_swiglu"),
        use("mlp.experts.down", Op.GROUPED_MM, "moe", "moe_down", HIDDEN, INNER, experts=EXPERTS),
    ]


class Text:
    """Lines of a graph. `add` returns the new node's name."""

    def __init__(self, name: str, first: int = 0) -> None:
        self.lines = [f"graph {name}"]
        self.first = first  # number of each operator's first node: names of two graphs never meet by chance
        self.numbers: dict[str, int] = {}
        self.types: dict[str, str] = {}

    def input(self, name: str, fqn: str, type_: str) -> str:
        self.lines.append(f"  %{name} = input({fqn}) : {type_}")
        self.types[name] = type_
        return name

    def add(self, op: str, args: str, type_: str, where: str = "", line: int = 10) -> str:
        base = op.rpartition(".")[2] if op.startswith(("aten.", "fp8c.")) else op
        number = self.numbers.get(base, self.first)
        self.numbers[base] = number + 1
        name = f"{base}_{number}" if number else base
        notes = f"   # {where}  moe.py:{line}" if where else f"   # moe.py:{line}"
        self.lines.append(f"  %{name} = {op}({args}) : {type_}{notes}")
        self.types[name] = type_
        return name

    def text(self, outputs: list[str]) -> str:
        return "\n".join([*self.lines, f"  return ({', '.join('%' + o for o in outputs)})"]) + "\n"


def chain(text: Text, start: str, count: int, where: str) -> str:
    """Small operators one after the other, as rotary embeddings, masks and norms are."""
    last = start
    for i in range(count):
        args = f"%{last}, %{start}" if i % 3 == 0 else f"%{last}, {i}"
        last = text.add(f"aten.{('mul', 'add', 'sub')[i % 3]}.Tensor", args, f"f32[{TOKENS}, 64]", where, 20 + i % 9)
    return last


def quantized(text: Text, value: str, rows: int, cols: int, fmt: str, where: str) -> tuple[str, str]:
    scales = f"f32[{max(1, rows // 128)}, {max(1, cols // 128)}]"
    pair = text.add("fp8c.quantize", f"%{value}, '{fmt}'", f"(e4m3[{rows}, {cols}], {scales})", where)
    return (
        text.add("getitem", f"%{pair}, 0", f"e4m3[{rows}, {cols}]", where),
        text.add("getitem", f"%{pair}, 1", scales, where),
    )


def gemm(text: Text, plan: PrecisionPlan, use: OpUse, which: str, a: str, b_: str, type_: str) -> str:
    formats = plan.uses[use.key].gemm(which)
    where = f"{which} {use.key}"
    if not formats.is_fp8:
        return text.add("aten.mm", f"%{a}, %{b_}", type_, where)
    q, s = quantized(text, a, TOKENS, use.k or 1, formats.a.text, where)
    wq, ws = quantized(text, b_, use.n or 1, use.k or 1, formats.b.text, where)
    op = "fp8c.scaled_grouped_mm" if use.op is Op.GROUPED_MM else "fp8c.scaled_mm"
    names = f"'{formats.a.text}', '{formats.b.text}', 128, bfloat16"
    return text.add(op, f"%{q}, %{s}, %{wq}, %{ws}, {names}", type_, where)


def graphs_of(plan: PrecisionPlan, layers: int, extra: int) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Texts of captured, joint, forward, backward; roles of captured's GEMMs; names that cross to backward."""
    forward, captured, backward = Text("forward", 100_000), Text("captured"), Text("backward", 200_000)
    roles: dict[str, str] = {}
    saved: list[str] = []
    weights: list[tuple[OpUse, str]] = []
    for text in (captured, forward):
        hidden = text.input("primals_1", "", f"bf16[{TOKENS}, {HIDDEN}]")
        number = 2
        for layer in range(layers):
            uses = {u.key: u for u in layer_uses(layer, layers)}
            at = f"model.layers.{layer}"
            residual = hidden
            hidden = chain(text, hidden, max(3, extra // 6), f"{at}.norm")
            attention = chain(text, hidden, extra // 3, f"{at}.attn")
            for key, use in uses.items():
                if use.op is Op.ATTENTION:
                    hidden = text.add(
                        "fp8c.attention", f"%{hidden}, %{attention}", f"bf16[{TOKENS}, {HIDDEN}]", f"{at}.attn"
                    )
                if not use.is_gemm:
                    continue
                weight = text.input(f"primals_{number}", use.param or "", f"bf16[{use.n}, {use.k}]")
                number += 1
                out = f"bf16[{TOKENS}, {use.n}]"
                if text is captured:
                    turned = text.add("aten.t", f"%{weight}", f"bf16[{use.k}, {use.n}]", use.path)
                    result = text.add("aten.mm", f"%{hidden}, %{turned}", out, use.path)
                    roles[result] = f"fprop {key}"
                else:
                    result = gemm(text, plan, use, "fprop", hidden, weight, out)
                    weights.append((use, weight))
                    if plan.uses[key].gemm("fprop").is_fp8 and plan.uses[key].cache("x"):
                        own = [n for n in text.types if n.startswith("getitem")][-4:-2]
                        saved += own
                if use.roles & {"attn_out_proj"}:
                    result = text.add("aten.add.Tensor", f"%{residual}, %{result}", out, at, 30)
                hidden = result
        loss = text.add("aten.mean", f"%{hidden}", "f32[]", "loss_function", 40)
    grad = captured.input("tangents_1", "", "f32[]")
    grad = captured.add("aten.expand", f"%{grad}", f"bf16[{TOKENS}, {HIDDEN}]", "loss_function", 40)
    for name in saved:
        backward.input(name, "", forward.types[name])
    back = backward.input("tangents_1", "", "f32[]")
    back = backward.add("aten.expand", f"%{back}", f"bf16[{TOKENS}, {HIDDEN}]", "loss_function", 40)
    for use, weight in reversed(weights):
        backward.input(weight, use.param or "", f"bf16[{use.n}, {use.k}]")
        kept = [n for n in saved if n in forward.types][:1]
        back = chain(backward, back, extra // 4, f"model.layers.{use.layer}.norm" if use.op is Op.LINEAR else use.path)
        wgrad = gemm(backward, plan, use, "wgrad", back, kept[0] if kept else back, f"bf16[{use.n}, {use.k}]")
        back = gemm(backward, plan, use, "dgrad", back, weight, f"bf16[{TOKENS}, {use.k}]")
        backward.add("aten.t", f"%{wgrad}", f"bf16[{use.k}, {use.n}]", use.path)
        grad = chain(captured, grad, extra // 6, f"model.layers.{use.layer}.norm")
        for which in ("dgrad", "wgrad"):
            name = captured.add("aten.mm", f"%{grad}, %{grad}", f"bf16[{TOKENS}, {use.k}]", use.path)
            roles[name] = f"{which} {use.key}"
            grad = name if which == "dgrad" else grad
    texts = {
        "captured": captured.text([grad]),
        "joint": captured.text([grad]),
        "forward": forward.text([loss, *saved]),
        "backward": backward.text([back]),
    }
    return texts, roles, saved


def write(path: Path, spec: str, layers: int, extra: int, remarks: tuple[str, ...]) -> None:
    loaded = load(spec)
    target = load_target("h200")
    uses = [u for layer in range(layers) for u in layer_uses(layer, layers)]
    plan = resolve(loaded, uses, target, partial=True)
    lock = plan.to_json()
    texts, roles, saved = graphs_of(plan, layers, extra)
    files = {"plan.lock.json": b.json_bytes(lock)}
    for name, text in texts.items():
        file, content = b.graph_file(name, text)
        files[file] = content
    for file, text in loaded.texts:
        files[b.spec_file(file)] = text.encode()
    notes = {
        "schema": "fp8c.graph-notes/1",
        "sources": {"moe.py:10": [["lib/moe.py", "y = self.experts(x)"]]},
        "roles": roles,
        "saved": {n: {"why": "cache x", "reason": None} for n in saved},
    }
    files["graphs/notes.json"] = b.packed_json(notes)
    gemms = {w: {"total": layers * 5, "fp8": layers * 4, "kept": layers} for w in ("fprop", "dgrad", "wgrad")}
    report = {
        "gemms": gemms,
        "uses": [],
        "saved": [],
        "layers": [{"layer": i, "bf16": 2048, "fp8c": 1024} for i in range(layers)],
        "saved_bytes": {"fp8c": 1024 * layers, "bf16": 2048 * layers, "logits": 0},
        "sections": [],
        "rules": [],
        "remarks": [{"code": "R0001", "text": text} for text in remarks],
        "model": {"name": "tiny", "reference": "tiny.py"},
        "target": record_json(target),
    }
    files["report.json"] = b.json_bytes(report)
    manifest = {
        "versions": {"fp8c": "0.1.0"},
        "model": {"reference": "tiny.py", "name": "tiny", "overrides": {}, "batch": None, "seq": None},
        "spec": {
            "name": loaded.name,
            "reference": spec,
            "sha256": loaded.digest,
            "files": {name: b.spec_file(name) for name, _ in loaded.texts},
        },
        "target": record_json(target),
        "plan": plan.digest(),
        "parameters": {u.param: f"bf16[{u.n}, {u.k}]" for u in uses if u.param},
    }
    b.write_build(path, manifest, files, {"argv": []}, {})


@pytest.fixture(scope="session")
def make_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuildMaker]:
    """`make_build(spec="deepseek_v3", layers=3, extra=6)` -> folder; the same arguments give the same folder."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(
        spec: str = "deepseek_v3", layers: int = 3, extra: int = 6, remarks: tuple[str, ...] = ("remark[R0001]: one",)
    ) -> Path:
        key = (spec, layers, extra, remarks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("builds") / "build"
            write(made[key], spec, layers, extra, remarks)
        return made[key]

    yield make


@pytest.fixture(scope="session")
def small_build(make_build: BuildMaker) -> Path:
    return make_build()
