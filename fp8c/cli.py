"""The command line. Each verb parses, calls one function, prints. Nothing here imports torch before a verb needs it.

stdout is the result, stderr the diagnostics. Exit codes: 0 ok, 1 a check failed, 2 usage, 3 spec, 4 model, 5 target,
70 a bug in fp8c.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fp8c import __version__, build_commands
from fp8c.command_options import (
    Finite,
    OutputFile,
    as_json_option,
    check_inputs_exist,
    command_line,
    model_request,
    print_diagnostics,
    print_json,
    spec_option,
    with_model_options,
)
from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.files import reason
from fp8c.spec_commands import spec

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_is_debugging = False
#: What a file system says of its state or of a path, wherever a command meets it.
_OUTSIDE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    global _is_debugging
    _is_debugging = False
    words = tuple(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    try:
        code = app.main(list(words), "fp8c", standalone_mode=False, obj=words)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except DiagnosticError as e:
        if _is_debugging:
            raise
        print_diagnostics(e.diagnostics)
        return int(e.exit_code)
    except click.ClickException as e:
        e.show()
        return int(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, ReaderGone):
        # The reader (`head`, a pager) has what it wants; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if _is_debugging or e.errno not in _OUTSIDE:
            return report_bug(e)
        what = f"cannot use {os.fsdecode(e.filename)}" if e.filename else "cannot write the output"
        print_diagnostics(fail("E0610", f"{what}: {reason(e)}").diagnostics)
        if not e.filename:  # what is still in its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.USAGE)
    except Exception as e:  # noqa: BLE001 (the last resort: say that it is a bug)
        return report_bug(e)


def report_bug(error: Exception) -> int:
    import traceback

    traceback.print_exception(error)
    print(f"fp8c: this is a bug in fp8c, not in your input: {type(error).__name__}: {error}", file=sys.stderr)
    return int(ExitCode.BUG)


def prepare_streams() -> None:
    """Streams that can be written to: a closed one (`>&-`) becomes the null device, and a character that the terminal's
    encoding lacks, or a file's name that is no text, is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class ReaderGone(Exception):
    """stdout was closed by its reader. click would end the process with 1 on a BrokenPipeError."""


class App(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGone from None


# -- verbs -------------------------------------------------------------------------------------------------------------


@click.group(cls=App, context_settings=_HELP)
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
@click.version_option(__version__, message="fp8c %(version)s")
def app(debug: bool) -> None:
    """Compile BF16 Mixture-of-Experts training steps to FP8 recipes."""
    global _is_debugging
    _is_debugging = debug


@app.command("doctor")
@as_json_option
def doctor_(as_json: bool) -> None:
    """Say what this machine offers, and which implementation serves which operator."""
    from fp8c.tools import doctor

    found = doctor.document()
    if as_json:
        print_json(doctor.SCHEMA, **found)
    else:
        print(doctor.text(found))


@app.command("compile")
@click.argument("model")
@spec_option
@with_model_options
@click.option("--out", "-o", default="build", show_default=True, metavar="DIR", help="Folder of the build.")
@click.option("--verify", is_flag=True, help="Run the step and check it against BF16, the plan and FP64.")
@click.option("--no-baseline", is_flag=True, help="Leave out the comparison with BF16's saved bytes.")
@click.option(
    "--without", multiple=True, metavar="PASS", help="Leave out an optional exact pass, causal-attention say."
)
@click.option(
    "--mesh",
    "mesh_text",
    metavar="NAME=N,...",
    help="Plan one rank of a mesh, e.g. ep=64,pp=16: experts are sharded over ep. Needs no GPU and no other process.",
)
@click.option("--force", is_flag=True, help="Replace a folder that fp8c did not write.")
@click.option("--kernels", is_flag=True, help="Compile the step's kernels and GEMMs for the target; needs no GPU.")
@click.option("--print-ir-before", multiple=True, metavar="PASS", help="Print the graph before this pass (to stderr).")
@click.option("--print-ir-after", multiple=True, metavar="PASS", help="Print the graph after this pass.")
@click.option("--print-ir-after-all", is_flag=True, help="Print the graph after every pass.")
@click.option("--print-ir-after-change", is_flag=True, help="Print the graph after every pass that changed it.")
@click.option("--time-passes", is_flag=True, help="Print the time of every pass.")
@click.option("--dump-dir", metavar="DIR", help="Write the graph after every pass to DIR/NN-pass.txt.")
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
@as_json_option
def compile_(
    model: str,
    spec: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
    out: str,
    verify: bool,
    no_baseline: bool,
    without: tuple[str, ...],
    mesh_text: str | None,
    force: bool,
    kernels: bool,
    print_ir_before: tuple[str, ...],
    print_ir_after: tuple[str, ...],
    print_ir_after_all: bool,
    print_ir_after_change: bool,
    time_passes: bool,
    dump_dir: str | None,
    debug: bool,
    as_json: bool,
) -> int:
    """Compile the training step of MODEL and write a build.

    MODEL is model.py (with model() and example_inputs()), model.py:factory, package.module:factory, hf:CONFIG.json or
    hf:MODEL_TYPE.
    """
    set_debugging(debug)
    check_inputs_exist(spec, target)
    from fp8c.models import parse_overrides
    from fp8c.tools import compile_command as command
    from fp8c.tools.ir_printing import Printing

    result = command.compile_model(
        command.Request(
            model=model,
            spec=spec,
            target=target,
            out=Path(out),
            overrides=parse_overrides(overrides),
            batch=batch,
            seq=seq,
            weights=weights,
            verify=verify,
            baseline=not no_baseline,
            mesh=command.parse_mesh(mesh_text),
            without=without,
            force=force,
            kernels=kernels,
            printing=Printing(
                print_ir_before,
                print_ir_after,
                print_ir_after_all,
                print_ir_after_change,
                Path(dump_dir) if dump_dir else None,
            ),
            argv=command_line(),
        )
    )
    if time_passes:
        print(command.times_text(result), file=sys.stderr)
    if as_json:
        print_json(command.SCHEMA, **result.to_json())
    else:
        print(command.result_text(result))
    return int(result.exit_code)


@app.command()
@click.argument("model")
@click.option("--passes", required=True, metavar="A,B", help="Passes to run, in this order; `fp8c passes` lists them.")
@spec_option
@with_model_options
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
def opt(
    model: str,
    passes: str,
    spec: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
    debug: bool,
) -> None:
    """Run named passes on the captured step of MODEL and print the graph."""
    set_debugging(debug)
    request = model_request(model, spec, target, overrides, batch, seq, weights)
    from fp8c.tools import opt_command

    names = tuple(name.strip() for name in passes.split(",") if name.strip())
    sys.stdout.write(opt_command.rewritten_text(request, names))


def set_debugging(debug: bool) -> None:
    global _is_debugging
    _is_debugging = _is_debugging or debug


@app.command()
@click.argument("model")
@spec_option
@with_model_options
@click.option(
    "--batches", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many batches to measure."
)
@click.option("--bisect", is_flag=True, help="Name the smallest set of rules and operands that makes the error.")
@click.option("--search", is_flag=True, help="Write the cheapest spec within an error budget.")
@click.option("--metric", type=click.Choice(["worst", "gradient", "loss"]), help="What --bisect and --search look at.")
@click.option("--limit", type=Finite(min=0), help="--bisect: the largest error that is fine.")
@click.option("--budget", type=Finite(min=0), help="--search: the largest error; half of what formats explain.")
@click.option("--inject", metavar="FAULT", default="", help="Break an operand, for example scale:layers.1.up:fprop.x.")
@click.option("--out", "-o", type=OutputFile(), help="Page (.html), picture (.svg) or document (.json).")
@click.option("--spec-out", type=OutputFile(), help="--search: the new spec; searched.fp8 unless given.")
@as_json_option
def numerics(
    model: str,
    spec: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
    inject: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Run the training step of MODEL in BF16 and under a spec, side by side, on real batches.

    Says where values lose more than their formats explain, which rules and operands make an error, and what the
    cheapest spec within an error budget is. `fp8c compile --help` says what a MODEL is.
    """
    request = model_request(model, spec, target, overrides, batch, seq, weights)
    from fp8c.tools.numerics import command, measure

    options["metric"] = options["metric"] or ""
    answer = command.run(request, command.Settings(fault=inject, **options))
    print_diagnostics(answer.remarks)
    if as_json:
        print_json(measure.SCHEMA, **answer.to_json())
    else:
        print(answer.text())
    return int(answer.exit_code)


@app.command()
@as_json_option
def passes(as_json: bool) -> None:
    """List the rewrites in the order they run."""
    import fp8c.ops  # noqa: F401  (passes name operators, which must be registered)
    from fp8c.passes import ALL_PASSES

    rows = [(p.name, _summary(sys.modules[type(p).__module__].__doc__ or "")) for p in ALL_PASSES]
    if as_json:
        print_json("fp8c.passes/1", passes=[{"name": name, "summary": summary} for name, summary in rows])
        return
    width = max(len(name) for name, _ in rows)
    for number, (name, summary) in enumerate(rows, 1):
        print(f"{number:2} {name:<{width}}  {summary}")


def _summary(doc: str) -> str:
    """The first paragraph of a module's docstring without the pass's name in front."""
    paragraph = doc.strip().partition("\n\n")[0].replace("\n", " ")
    return paragraph.partition(": ")[2] or paragraph


@app.command()
@click.argument("name", required=False)
@as_json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the machines fp8c knows, or show NAME, which may be a .toml file of your own."""
    from fp8c.backends.target import load_target, names, record_json

    records = [load_target(n) for n in ([name] if name else names())]
    if as_json:
        print_json("fp8c.targets/1", targets=[record_json(r) for r in records])
    elif name:
        for key, value in record_json(records[0]).items():
            print(f"{key:26} {', '.join(map(str, value)) if isinstance(value, list) else value}".rstrip())
    else:
        for r in records:
            rates = f"{r.fp8_tflops:g} TFLOPS FP8" if r.fp8_tflops else ""
            print(f"{r.name:8} {r.architecture:6} {rates:17} {r.description}")


@app.command()
@click.argument("build", required=False, type=click.Path(path_type=Path))
@click.option("--durations", type=click.Path(path_type=Path), help="Table of durations instead of a build.")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="2048 for a table unless given; for a build as many as one replica needs.",
)
@click.option("--topology", help="Machine: a name, or a cost sheet of your own; h800, or the target of the build.")
@click.option("--pp", type=click.IntRange(min=1), help="Pipeline ranks.")
@click.option("--ep", type=click.IntRange(min=1), help="GPUs that share the experts.")
@click.option("--schedule", help="1f1b, interleaved, zb, zbv, dualpipe or dualpipev.")
@click.option("--sequences", type=click.IntRange(min=1), help="Sequences of one optimizer step.")
@click.option("--comm-sms", type=click.IntRange(min=1), help="SMs that communication gets.")
@click.option("--choose-sms", is_flag=True, help="Give communication the SMs with which a pair is shortest.")
@click.option("--zipf", type=Finite(min=0), default=0.0, show_default=True, help="Exponent of expert popularity.")
@click.option("--loads", type=click.Path(path_type=Path), help="JSON list of measured tokens per expert.")
@click.option("--even", is_flag=True, help="Exactly even routing, without sampling noise.")
@click.option("--overlap/--no-overlap", default=True, help="Let transfers run beside compute.")
@click.option("--released", is_flag=True, help="Chunks without a partner run as fast as alone.")
@click.option("--predict", is_flag=True, help="Take durations from the cost model, not from the table.")
@click.option("--memory-gib", type=Finite(min=0), help="Budget for activations on one GPU.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--what-if", is_flag=True, help="Say what each of the hardware wishes would save.")
@click.option("--figures", type=click.Path(path_type=Path), help="Draw the pictures of docs/overlap.md into a folder.")
@click.option("--trace", type=click.Path(path_type=Path), default=Path("simulate.trace.json"), show_default=True)
@as_json_option
def simulate(
    build: Path | None,
    durations: Path | None,
    gpus: int | None,
    topology: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Simulate a training step on a cluster, from a BUILD or a table of durations.

    Prints the step's time, what communication stays exposed and the cost of a trillion tokens, and writes a trace that
    Perfetto opens.
    """
    from fp8c.tools import simulate as tool

    table, run = tool.inputs(build, durations, gpus, topology, **options)
    if options["figures"]:
        from fp8c.tools.overlap_figures import write_figures

        print_json("fp8c.overlap-figures/1", **write_figures(table, run.machine, options["figures"]))
        return
    if options["what_if"]:
        answers = tool.what_if(table, run)
        if as_json:
            print_json("fp8c.what-if/1", answers=[a.to_json() for a in answers])
        else:
            print(tool.what_if_text(answers))
        return
    report = tool.simulate(table, run, trace=options["trace"])
    if as_json:
        print_json(tool.SCHEMA, **report.to_json())
    else:
        print(tool.table_text(report))


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="NAME [OPTIONS]...")
def bench(arguments: tuple[str, ...]) -> int:
    """Measure on this machine's GPU against the BF16 baseline in the same process; `fp8c bench NAME --help` says more."""
    from fp8c.tools.bench.__main__ import main as run

    return run(list(arguments))


@app.command()
@click.argument("trace", type=click.Path(path_type=Path))
@as_json_option
def profile(trace: Path, as_json: bool) -> None:
    """Read a Chrome TRACE of GPU kernels: cost by annotation, and how much communication is exposed."""
    from fp8c.tools import profile as tool

    report = tool.profile(trace)
    if as_json:
        print_json("fp8c.profile/1", **report.to_json())
    else:
        print(tool.profile_text(report))


for command in (spec, *build_commands.COMMANDS):
    app.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
