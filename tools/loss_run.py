"""One run of the loss gap: a byte-level MoE trained in BF16 or under a spec, and what FP8 costs the finished model.

On a GPU forward and backward are captured in a CUDA graph after the first steps and replayed; the optimizer runs outside
of it. Small models would otherwise wait for the host.

`bf16-flipped` and `bf16-reversed` are BF16 with the same sums in another order, `bf16-again` is BF16 a second time (GPU
kernels that add with atomics make it another run), and `bf16-launched` a run without the CUDA graph. The other names are specs (`SPECS`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fp8c
from fp8c.optim import AdamW, checkpoint
from fp8c.tools.rounded_gemms import Errors, GradientGroups, RoundedOperands

BF16 = ("bf16", "bf16-reversed", "bf16-flipped", "bf16-again", "bf16-launched")
_PART = """version 1;
use "std:deepseek_v3" as ds;
format block = e4m3 [128x128] scale fp32 online;
"""
_NO_BACKWARD = """    dgrad { dy = bf16; w = bf16; }
    wgrad { x = bf16; dy = bf16; }
    cache x off;
"""
_NO_CACHE = "  override rule kept for @ds.expert_swiglu { cache gate as bf16; cache up as bf16; }\n"
#: Variants of the spec, each a spec of its own: parts of the recipe with the rest in BF16, and the paper's negative
#: result (appendix B.2), activation gradients in 128x128 blocks. That one is of the Linears: grouped GEMMs take
#: activations in rows only, because an expert's tokens start anywhere.
SPECS = {
    "blocks": f"""{_PART}
spec block_gradients extends ds {{
  override rule blocks for op(linear) & !@ds.high_precision {{
    dgrad {{ dy = block; }}
    because "B.2: quantized in blocks, activation gradients made a 16B model diverge";
  }}
}}
""",
    "forward": f"""{_PART}
spec forward_only extends ds {{
  override rule backward for @ds.gemms {{
{_NO_BACKWARD}  }}
{_NO_CACHE}  override combine_grad {{ payload = bf16; }}
}}
""",
    "backward": f"""{_PART}
spec backward_only extends ds {{
  override rule forward for @ds.gemms {{ fprop {{ x = bf16; w = bf16; }} }}
  override dispatch {{ payload = bf16; }}
}}
""",
    "dgrad": f"""{_PART}
spec dgrad_only extends ds {{
  override rule others for @ds.gemms {{
    fprop {{ x = bf16; w = bf16; }}
    wgrad {{ x = bf16; dy = bf16; }}
    cache x off;
  }}
{_NO_CACHE}  override dispatch {{ payload = bf16; }}
}}
""",
}
#: Sizes of the model beside the small one that the options give: about 100 M parameters, few layers and wide experts,
#: or more and narrower layers.
SIZES: dict[str, dict[str, Any]] = {
    "": {},
    "100m": dict(
        dim=768, n_layers=3, n_heads=6, n_experts=16, expert_hidden_dim=768, dense_hidden_dim=2304,
        q_lora_rank=256, kv_lora_rank=256,
    ),
    "100m-deep": dict(
        dim=512, n_layers=7, n_heads=4, n_experts=16, expert_hidden_dim=512, dense_hidden_dim=1536,
        q_lora_rank=256, kv_lora_rank=128,
    ),
}  # fmt: skip
SAVE_EVERY = 250
GRADIENT_BATCHES = 2
AHEAD = 16  # steps that the host may be ahead of the GPU: a run that is stopped for a while leaves little work behind
FRESH_BATCHES, FRESH_SEED = 4, 1 << 20  # batches that no run trains on
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "moe_transformer.py"


@dataclass(frozen=True)
class Setup:
    """One experiment; runs are compared only within the same setup."""

    spec: str = "deepseek_v3"
    steps: int = 300
    batch: int = 8
    length: int = 128
    lr: float = 1e-3
    warmup: int = 20
    dim: int = 256
    n_layers: int = 2
    n_experts: int = 4
    device: str = "cpu"
    size: str = ""
    corpus: str = "top"  # "top": the standard library's top-level sources; "all": its packages too
    shared: int = 0  # steps in BF16 that all variants of a seed have in common: they branch off one run


@dataclass
class Run:
    """What a run has found so far.

    losses: of every step
    fresh:  mean loss of the finished weights on fresh batches, by how the forward is computed: "own", as trained; "bf16";
            "fp8", with the operands of every GEMM that the spec quantizes rounded to E4M3 in groups, in plain PyTorch;
            "activations" and "weights", one kind of operand rounded alone
    gradients: what quantizing the finished weights' activation gradients costs, by kind of GEMM and shape of groups
    """

    losses: list[float] = field(default_factory=list)
    fresh: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, dict[str, Errors]] = field(default_factory=dict)


class ReversedSums(TorchFunctionMode):
    """Every GEMM over a reversed reduction axis: the same sums in another order."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x.flip(-1), weight.flip(-1), *rest, **kwargs)
        if func in (torch._grouped_mm, torch.nn.functional.grouped_mm):
            x, weight, *rest = args
            return func(x.flip(-1), weight.flip(-2), *rest, **kwargs)
        return func(*args, **kwargs)


class CapturedStep:
    """Forward and backward as one CUDA graph. Gradients must go where they stay, to `main_grad`."""

    def __init__(self, step: Callable[..., Any], batch: dict[str, Tensor]) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(**self.batch).loss.backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = step(**self.batch).loss
            loss.backward()
            self.loss = loss.detach()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
        loss: Tensor = self.loss.clone()
        return loss


class Pace:
    """Keeps the host at most AHEAD steps before the GPU, asleep rather than asking again and again."""

    def __init__(self) -> None:
        self.marks: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        self.marks[-1].record()
        if len(self.marks) > AHEAD:
            self.marks.popleft().synchronize()


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_transformer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ignore(_: Run) -> None:
    return None


@dataclass
class Trainer:
    """A run: the model, what is called for a step, and the optimizer. The same weights and batches for every variant."""

    setup: Setup
    variant: str
    seed: int

    def __post_init__(self) -> None:
        from fp8c.prepare import prepare

        example, setup = load_example(), self.setup
        torch.manual_seed(self.seed)
        shape = {"dim": setup.dim, "n_layers": setup.n_layers, "n_experts": setup.n_experts, **SIZES[setup.size]}
        self.model = example.Transformer(example.Config(**shape)).to(setup.device)
        self.corpus = read_corpus(setup, example)
        self.batches = Batches(self.corpus, setup, self.seed)
        prepare(self.model, self.batches.at(0))  # the same grouped experts on all sides
        self.step = compiled_call(self.model, setup, self.variant)
        self.compiled = self.step if isinstance(self.step, torch.nn.Module) else self.model
        self.optimizer = AdamW(
            self.compiled,
            lr=setup.lr,
            weight_decay=0.1,
            max_norm=1.0,
            spec=setup.spec,
            main_grad=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: cosine(i, setup.steps) * min(1.0, (i + 1) / max(1, setup.warmup))
        )
        self._captured: CapturedStep | None = None

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward, replayed once they are captured."""
        if self.variant == "bf16-flipped":
            batch = {name: tensor.flip(0) for name, tensor in batch.items()}
        if self._captured is not None:
            return self._captured(batch)
        with ReversedSums() if self.variant == "bf16-reversed" else contextlib.nullcontext():
            loss: Tensor = self.step(**batch).loss
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def capture(self) -> None:
        """Replay from now on. The calls before the capture leave no trace in gradients and routers' counts."""
        self._captured = CapturedStep(self.step, self.batches.at(0))
        self.forget()

    def keep_start(self, folder: Path | None, losses: list[float]) -> None:
        """The run so far, for the other variants of this seed to go on from."""
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses))
        checkpoint.save(folder, len(losses), self.compiled, self.optimizer, schedule=self.schedule)

    def start_from(self, folder: Path | None) -> list[float]:
        """Wait for BF16's run of this seed to have come to the end of what is shared; its losses until there."""
        assert folder is not None
        while checkpoint.newest(folder) is None:
            time.sleep(0.2)
        checkpoint.load(folder, self.compiled, self.optimizer, other_spec=True, schedule=self.schedule)
        losses: list[float] = json.loads((folder / "losses.json").read_text())
        return losses

    def forget(self) -> None:
        self.optimizer.zero_grad()
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.load"):
                buffer.zero_()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.model.update_router_biases()

    def fresh_losses(self) -> dict[str, float]:
        """See `Run.fresh`. Weights and optimizer stay as they are."""
        count = FRESH_BATCHES
        batches = Batches(self.corpus, self.setup, FRESH_SEED, count)
        found = {"own": [self.loss(batches.at(i)) for i in range(count)]}
        self.forget()
        high = [self.model.head.weight]
        modes: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
            "bf16": contextlib.nullcontext,
            "fp8": lambda: RoundedOperands(high),
            "activations": lambda: RoundedOperands(high, weights=False),
            "weights": lambda: RoundedOperands(high, activations=False),
        }
        for name, mode in modes.items():
            with torch.no_grad(), mode():
                found[name] = [self.model.forward(**batches.at(i)).loss for i in range(count)]
        self.forget()
        return {name: float(torch.stack(losses).mean()) for name, losses in found.items()}

    def gradient_errors(self) -> dict[str, dict[str, Errors]]:
        """See `Run.gradients`: an ordinary forward and backward of the model on fresh batches."""
        batches = Batches(self.corpus, self.setup, FRESH_SEED, GRADIENT_BATCHES)
        with GradientGroups([self.model.head.weight]) as groups:
            for i in range(GRADIENT_BATCHES):
                self.model.forward(**batches.at(i)).loss.backward()
        self.forget()
        found: dict[str, dict[str, Errors]] = groups.errors()
        return found


def train(
    setup: Setup,
    variant: str,
    seed: int,
    show: Callable[[str], None],
    save: Callable[[Run], None] = ignore,
    compiled: Callable[[], None] = lambda: None,
    starts: Path | None = None,
) -> Run:
    """One run. save: called with what there is so far; compiled: after the first forward and backward; starts: folder of
    what seeds share (`Setup.shared`).
    """
    trainer, run = Trainer(setup, variant, seed), Run()
    start = None if starts is None else starts / f"seed-{seed}"
    started = time.perf_counter()
    loss = float(trainer.loss(trainer.batches.at(0)))
    trainer.forget()
    show(f"seed {seed} {variant} compiled after {time.perf_counter() - started:.1f} s, loss {loss:.4f}")
    compiled()
    if setup.shared and variant != "bf16":
        run.losses = trainer.start_from(start)
    first = len(run.losses)
    if setup.device == "cuda" and variant != "bf16-launched":
        trainer.capture()
    waiting: list[Tensor] = []  # still on the device, so that no step waits
    pace, started = Pace(), time.perf_counter()
    for i in range(first, setup.steps):
        waiting.append(trainer.loss(trainer.batches.at(i)))
        trainer.update()
        done = i + 1
        if setup.device == "cuda":
            pace.mark()
        shared = done == setup.shared and variant == "bf16"
        if shared or done % SAVE_EVERY == 0 or done == setup.steps or done % 50 == 0 and setup.device == "cpu":
            run.losses += torch.stack(waiting).tolist()
            waiting.clear()
            save(run)
            rate = (time.perf_counter() - started) / (done - first) * 1e3
            show(f"seed {seed} {variant} step {done} loss {run.losses[-1]:.4f} {rate:.1f} ms/step")
        if shared:
            trainer.keep_start(start, run.losses)
    run.fresh = trainer.fresh_losses()
    run.gradients = trainer.gradient_errors()
    save(run)
    return run


def compiled_call(model: torch.nn.Module, setup: Setup, variant: str) -> Callable[..., Any]:
    if variant not in BF16:
        with spec_file(setup, variant) as spec:
            step: Callable[..., Any] = fp8c.compile(model, spec=spec, dynamic=False, main_grad=True)
        return step
    if setup.device == "cuda":
        model.compile(dynamic=False)
    return model


@contextlib.contextmanager
def spec_file(setup: Setup, variant: str) -> Iterator[str | Path]:
    """The spec of a variant, for as long as it takes to read it."""
    if variant == "spec":
        yield setup.spec
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{variant}.fp8"
        path.write_text(SPECS[variant])
        yield path


class Batches:
    """Batch `i` of a seed: the same whatever the variant. The text lies on the device, so no step copies anything."""

    def __init__(self, corpus: Tensor, setup: Setup, seed: int, count: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        many = (setup.steps if count is None else count, setup.batch, 1)
        starts = torch.randint(len(corpus) - setup.length - 1, many, generator=generator)
        self.corpus, self.starts = corpus.to(setup.device), starts.to(setup.device)
        self.offsets = torch.arange(setup.length + 1, device=setup.device)

    def at(self, i: int) -> dict[str, Tensor]:
        window = self.corpus[self.starts[i] + self.offsets].long()
        return {"tokens": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}


def read_corpus(setup: Setup, example: ModuleType) -> Tensor:
    if setup.corpus == "top":
        found: Tensor = example.read_corpus()
        return found
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(f.parts)]
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def cosine(i: int, steps: int) -> float:
    """Cosine decay to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))
