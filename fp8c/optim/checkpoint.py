"""Checkpoints: everything a run needs to go on bit for bit, written beside the old ones and put in place whole.

    checkpoint.save("runs/a", 1000, step, optimizer, ema=ema, schedule=scheduler, data=generator)
    number = checkpoint.load("runs/a", step, optimizer, ema=ema, schedule=scheduler, data=generator)    # the newest

    runs/a/step-00001000/   checkpoint.json    numbers, settings, spec, world size; written last
                            rank-0.json        random states and what else is each rank's own
                            *.distcp           tensors, by torch.distributed.checkpoint

A save goes to a folder of another name, is flushed to disk, and is renamed when every rank is done: when a rank dies in
between, the folder keeps its other name, and the newest checkpoint is the old one. Tensors are DTensors where they are
sharded, so another number of ranks, FSDP2, ZeRO-1 or one process load each other's checkpoints; only with the same
number of ranks do sums come out in the same order, which is said (W1131). Of schedulers, loaders and generators another
number of ranks gets what was the same on all of them. torch.distributed.checkpoint keeps its index in a pickle: load
checkpoints of your own only.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from fp8c.diagnostics import Diagnostic, ExitCode, Severity, fail
from fp8c.optim.adamw import STATES, AdamW, local
from fp8c.optim.ema import EMA

log = logging.getLogger("fp8c")

SCHEMA = "fp8c.checkpoint/1"
_NAME = re.compile(r"step-(\d{8,})")
_RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Loaded:
    """What was found: the step to go on after, the folder, and what may differ from an uninterrupted run."""

    number: int
    path: Path
    remarks: tuple[Diagnostic, ...] = field(default=())


def save(
    folder: str | Path,
    number: int,
    module: nn.Module,
    optimizer: AdamW | None = None,
    ema: EMA | None = None,
    *,
    keep: int = 2,
    **others: Any,
) -> Path:
    """Write step `number`; every rank calls it. Returns the checkpoint's folder.

    keep:   the newest so many stay, older ones are removed once this one is in place; 0 keeps all
    others: objects with `state_dict`/`load_state_dict` (schedulers, loaders) or a torch.Generator; each rank keeps its
            own, and another number of ranks goes on with those that were the same on all
    Raises: DiagnosticError E1130 when the folder cannot be written
    """
    folder = Path(folder)
    final, partial = folder / f"step-{number:08}", folder / f".saving-step-{number:08}"
    rank, world = _rank_and_world()
    if rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise fail("E1130", f"cannot write {partial}: {error.strerror}", exit_code=ExitCode.USAGE) from error
    _barrier()
    if optimizer is not None:
        optimizer.init_state()  # of parameters that no step has had a gradient for, which loading expects too
    tensors, record = state_of(module, optimizer, ema)
    with _single_process_is_meant(world):
        save_tensors(tensors, checkpoint_id=partial, no_dist=world == 1)
    _write(
        partial / f"rank-{rank}.json",
        {
            "random": random_state(),
            "others": {k: pack(_state(v)) for k, v in others.items()},
            "scales": pack(_scales_of(module)),
        },
    )
    _barrier()
    if rank == 0:
        for file in partial.iterdir():
            _flush(file)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        _write(partial / _RECORD, {"schema": SCHEMA, "number": number, "world": world, "files": sizes, **record})
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(folder)
        there = complete(folder)
        later = there[there.index(final) + 1 :]
        if later:
            log.warning(
                "%s is not the newest in its folder: a run without a step's name goes on with %s", final, later[-1]
            )
        for old in [path for path in there if path not in later][: -keep or None] if keep else []:
            shutil.rmtree(old)
    _barrier()
    return final


def load(
    folder: str | Path,
    module: nn.Module,
    optimizer: AdamW | None = None,
    ema: EMA | None = None,
    *,
    other_spec: bool = False,
    **others: Any,
) -> Loaded | None:
    """Bring everything to the newest checkpoint of a folder (or to the checkpoint given); None when there is none.

    other_spec: go on under another spec than the checkpoint's
    Raises: DiagnosticError E1131 (damaged), E1132 (another spec), E1133 (other parameters)
    """
    path = newest(folder)
    if path is None:
        return None
    record = read_record(path)
    rank, world = _rank_and_world()
    remarks = []
    if optimizer is not None:
        optimizer.init_state()
    tensors, own = state_of(module, optimizer, ema)
    unused = check_fits(path, record, own, tensors, other_spec)
    if unused:
        text = f"the checkpoint has states of {listed(unused)} as well, which this run does not train"
        remarks.append(Diagnostic("W1132", text, severity=Severity.WARNING))
    with _single_process_is_meant(world):
        load_tensors(tensors, checkpoint_id=path, no_dist=world == 1)
    apply_record(record, optimizer, ema)
    kept = own_states(path, record, rank, world)
    apart = sorted(name for name in others if name in kept.apart)
    for name, thing in others.items():
        if name in kept.others:
            _restore(thing, unpack(kept.others[name]))
    if kept.random is not None:
        restore_random_state(kept.random)
    if kept.scales is not None and (session := module.__dict__.get("fp8c_session")) is not None:
        session.scales.load_state_dict({site: t.to(device_of(module)) for site, t in unpack(kept.scales).items()})
    if world != record["world"]:
        text = f"the checkpoint is of {record['world']} ranks, this run has {world}: it goes on, but not bit for bit"
        if apart:
            text += f"; each rank had its own {', '.join(apart)}, which begin anew"
        remarks.append(Diagnostic("W1131", text, severity=Severity.WARNING))
    return Loaded(int(record["number"]), path, tuple(remarks))


@dataclass(frozen=True)
class OwnStates:
    """What a rank finds of the states each rank keeps: packed, by name; `apart`: those that no single state stands
    for."""

    others: dict[str, Any]
    apart: frozenset[str] = frozenset()
    random: dict[str, Any] | None = None
    scales: dict[str, Any] | None = None


def own_states(path: Path, record: Mapping[str, Any], rank: int, world: int) -> OwnStates:
    """This rank's states. On another number of ranks: what was the same on all of them, as schedulers are."""
    ranks = range(record["world"]) if world != record["world"] else [rank]
    found = [json.loads((path / f"rank-{r}.json").read_text(encoding="utf-8")) for r in ranks]
    if world == record["world"]:
        return OwnStates(found[0]["others"], random=found[0]["random"], scales=found[0].get("scales"))
    first: dict[str, Any] = found[0]["others"]
    apart = frozenset(name for name in first if any(f["others"].get(name) != first[name] for f in found))
    return OwnStates({name: state for name, state in first.items() if name not in apart}, apart)


# --- what is in it ----------------------------------------------------------------------------------------------------


def state_of(module: nn.Module, optimizer: AdamW | None, ema: EMA | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, which loading fills in place, and the record of everything that is no tensor."""
    model = {name: tensor.detach() for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    tensors: dict[str, Any] = {"model": model}
    session = module.__dict__.get("fp8c_session")
    spec = None if session is None else {"name": session.spec.name, "sha256": session.spec.digest}
    record: dict[str, Any] = {"torch": torch.__version__, "spec": spec}
    if optimizer is not None:
        names = names_of(module, optimizer)
        states = {names[p]: state for p, state in optimizer.state.items()}
        for key in ("step", *STATES):
            found = {name: state[key] for name, state in states.items() if key in state}
            if found:
                tensors[f"optimizer.{key}"] = found
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        record["optimizer"] = {
            "types": {k: str(getattr(optimizer.types, k)) for k in ("master", "exp_avg", "exp_avg_sq")},
            "groups": [{k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()} for group in settings],
            "skipped": optimizer.skipped,
        }
    if ema is not None:
        state = ema.state_dict()
        tensors["ema"] = state.pop("average")
        record["ema"] = state
    return tensors, record


def _scales_of(module: nn.Module) -> dict[str, Tensor]:
    """Histories of delayed scales: every rank scales what it quantizes itself."""
    session = module.__dict__.get("fp8c_session")
    return {} if session is None else session.scales.state_dict()


def device_of(module: nn.Module) -> torch.device:
    return next((local(p).device for p in module.parameters()), torch.device("cpu"))


def names_of(module: nn.Module, optimizer: AdamW) -> dict[Tensor, str]:
    """Names of the optimizer's parameters: the module's, or their numbers where the module does not have them."""
    by_tensor = {p: name for name, p in module.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: by_tensor.get(p, f"parameter {number}") for number, p in enumerate(params)}


def check_fits(
    path: Path, record: Mapping[str, Any], own: Mapping[str, Any], tensors: Mapping[str, Any], other_spec: bool
) -> list[str]:
    """Raises E1132 and E1133 (see `load`). Returns the parameters whose states in the checkpoint nobody takes: those
    that are frozen now.
    """
    was, now = record["spec"], own["spec"]
    if was is not None and now is not None and was != now and not other_spec:
        same_name = was["name"] == now["name"]
        raise fail(
            "E1132",
            f"{path} was trained with spec '{was['name']}'"
            + (", whose text has changed since" if same_name else f", this step is compiled with '{now['name']}'"),
            help="compile with that spec, or load(..., other_spec=True) to go on under the new one",
            exit_code=ExitCode.SPEC,
        )
    groups = [len(o["optimizer"]["groups"]) if "optimizer" in o else 0 for o in (record, own)]
    if all(groups) and groups[0] != groups[1]:
        raise fail(
            "E1133",
            f"{path} has {groups[0]} parameter groups with settings of their own, this optimizer {groups[1]}",
            help="build the optimizer as the run that saved it did",
            exit_code=ExitCode.MODEL,
        )
    metadata = stored(path)
    wanted = {f"{part}.{name}": tensor for part, group in tensors.items() for name, tensor in group.items()}
    missing = sorted(wanted.keys() - metadata.keys())
    unknown = sorted(name for name in metadata.keys() - wanted.keys() if name.startswith("model."))
    misfits = [f"the checkpoint lacks {listed(missing)}"] if missing else []
    misfits += [f"the model has no {listed([name.removeprefix('model.') for name in unknown])}"] if unknown else []
    misfits += [
        f"{name} is {list(metadata[name].size)} there and {list(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in metadata and metadata[name].size != tensor.shape
    ][:4]
    if misfits:
        help = "build model, optimizer and moving average as the run that saved it did"
        if are_stacks_and_lists(unknown, [name for name in missing if name.startswith("model.")]):
            help = (
                "a mesh makes stacks of experts that are a list: a run with one goes on with a mesh, of one rank in one "
                "process, and a run without one goes on without"
            )
        raise fail(
            "E1133",
            f"{path} does not fit: " + "; ".join(misfits),
            help=help,
            exit_code=ExitCode.MODEL,
        )
    prefixes = [f"{part}." for part in tensors if part != "model"]
    unused = metadata.keys() - wanted.keys()
    return sorted({name.removeprefix(start) for start in prefixes for name in unused if name.startswith(start)})


def are_stacks_and_lists(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether names of both are alike but for numbers that only one has: `experts.gate.weight`, `experts.0.gate.weight`."""
    depths = [{re.sub(r"\.\d+(?=\.)", "", name): name.count(".") for name in names} for names in (some, others)]
    return any(depths[0][name] != depths[1][name] for name in depths[0].keys() & depths[1].keys())


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes and types of a checkpoint's tensors."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: item for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}


def apply_record(record: Mapping[str, Any], optimizer: AdamW | None, ema: EMA | None) -> None:
    if optimizer is not None and "optimizer" in record:
        for group, saved in zip(optimizer.param_groups, record["optimizer"]["groups"]):
            group.update({k: tuple(v) if k == "betas" else v for k, v in saved.items()})
        optimizer.control(local(optimizer.param_groups[0]["params"][0]).device)[3] = record["optimizer"]["skipped"]
    if ema is not None and "ema" in record:
        saved = record["ema"]
        ema.decay, ema.every = float(saved["decay"]), int(saved["every"])
        ema.calls, ema.updates = int(saved["calls"]), int(saved["updates"])


def random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    state = {"python": [version, list(words), gauss], "cpu": pack(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = pack(torch.cuda.get_rng_state())
    if "numpy" in sys.modules:  # what loaders and augmentations draw from
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(unpack(state["cpu"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(unpack(state["cuda"]))
    if "numpy" in sys.modules and "numpy" in state:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))


def _state(thing: Any) -> Any:
    return {"state": thing.get_state()} if isinstance(thing, torch.Generator) else thing.state_dict()


def _restore(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state["state"])
    else:
        thing.load_state_dict(state)


def pack(value: Any) -> Any:
    """JSON for plain values and (small) tensors: a tensor is its type, shape and bytes.

    Raises: DiagnosticError E1134 for anything else.
    """
    match value:
        case Tensor():
            flat = value.detach().cpu().contiguous().view(-1)
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            return {"tensor": base64.b64encode(data).decode(), "dtype": dtype, "shape": shape}
        case dict():
            return {"items": [[pack(k), pack(v)] for k, v in value.items()]}
        case tuple():
            return {"tuple": [pack(v) for v in value]}
        case list():
            return [pack(v) for v in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise fail("E1134", f"cannot save a {type(value).__name__}: checkpoints hold plain values and tensors")


def unpack(value: Any) -> Any:
    match value:
        case {"tensor": text, "dtype": dtype, "shape": shape}:
            data = bytearray(base64.b64decode(text))
            kind: torch.dtype = getattr(torch, dtype)
            return torch.frombuffer(data, dtype=kind).clone().view(shape) if data else torch.empty(shape, dtype=kind)
        case {"items": items}:
            return {unpack(k): unpack(v) for k, v in items}
        case {"tuple": values}:
            return tuple(unpack(v) for v in values)
        case list():
            return [unpack(v) for v in value]
        case _:
            return value


# --- on disk ----------------------------------------------------------------------------------------------------------


def complete(folder: str | Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first. What a broken save left behind is none."""
    found = [p for p in Path(folder).glob("step-*") if _NAME.fullmatch(p.name) and (p / _RECORD).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder, or the folder when it is one."""
    folder = Path(folder)
    if (folder / _RECORD).is_file():
        return folder
    found = complete(folder)
    return found[-1] if found else None


def read_record(path: Path) -> dict[str, Any]:
    """Raises: DiagnosticError E1131 for a checkpoint with missing or cut files, or of another version."""
    try:
        record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail("E1131", f"{path / _RECORD} cannot be read: {error}") from error
    if record.get("schema") != SCHEMA:
        raise fail("E1131", f"{path} has schema {record.get('schema')!r}, expected {SCHEMA!r}")
    for name, size in record["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise fail("E1131", f"{file} is missing or was cut: expected {size} bytes", help="load an older checkpoint")
    return record


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """To the disk itself, so that a rename never overtakes what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def _single_process_is_meant(world: int) -> Iterator[None]:
    """torch.distributed.checkpoint warns that one process may be a mistake."""
    with warnings.catch_warnings():
        if world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier() -> None:
    if _rank_and_world()[1] > 1:
        dist.barrier()


def model_tensors(path: str | Path, source: str = "model") -> dict[str, Tensor]:
    """All tensors of one part of a checkpoint ("model", "ema", "optimizer.master") on the CPU, whole.

    Raises: DiagnosticError E1131 for no checkpoint or a damaged one; E1133 when it has no such part.
    """
    found = newest(path)
    if found is None:
        raise fail("E1131", f"{path} holds no checkpoint", exit_code=ExitCode.USAGE)
    read_record(found)
    metadata = stored(found)
    prefix = f"{source}."
    names: Iterable[str] = [name for name in metadata if name.startswith(prefix)]
    if not names:
        raise fail("E1133", f"{found} has no part '{source}'", exit_code=ExitCode.USAGE)
    tensors = {
        name.removeprefix(prefix): torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype)
        for name in names
    }
    with _single_process_is_meant(1):
        load_tensors({source: tensors}, checkpoint_id=found, no_dist=True)
    return tensors
