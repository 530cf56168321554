"""The command line. Each verb parses, calls one function, prints. Nothing here imports torch before a verb needs it.

stdout is the result, stderr the diagnostics. Exit codes: 0 ok, 1 a check failed, 2 usage, 3 spec, 4 model, 5 target,
70 a bug in fp8c.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fp8c import __version__, build_commands
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, render

_COLOURS = {"error": "\033[1;31m", "warning": "\033[1;33m", "remark": "\033[1;36m"}
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_is_debugging = False
_arguments: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    global _is_debugging, _arguments
    _is_debugging = False
    _arguments = tuple(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app.main(list(arguments) if arguments is not None else None, "fp8c", standalone_mode=False)
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
    except BrokenPipeError:
        # The reader (`head`, a pager) has what it wants; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:  # noqa: BLE001 (the last resort: say that it is a bug)
        import traceback

        traceback.print_exc()
        print(f"fp8c: this is a bug in fp8c, not in your input: {type(e).__name__}: {e}", file=sys.stderr)
        return int(ExitCode.BUG)


def print_diagnostics(diagnostics: Sequence[Diagnostic]) -> None:
    """Diagnostics to stderr, with colour only on a terminal and never under NO_COLOR."""
    has_colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    for diagnostic in diagnostics:
        text = render(diagnostic)
        if has_colour:
            word = diagnostic.severity.value
            text = re.sub(rf"({word}\[\w+\])", rf"{_COLOURS[word]}\1\033[0m", text, count=1)
        print(text, file=sys.stderr)


def print_json(schema: str, **fields: Any) -> None:
    print(json.dumps({"schema": schema, **fields}, indent=2, ensure_ascii=False))


# -- verbs -------------------------------------------------------------------------------------------------------------

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


@click.group(context_settings=_HELP)
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
@click.version_option(__version__, message="fp8c %(version)s")
def app(debug: bool) -> None:
    """Compile BF16 Mixture-of-Experts training steps to FP8 recipes."""
    global _is_debugging
    _is_debugging = debug


@app.group()
def spec() -> None:
    """Work with precision specs (*.fp8)."""


model_options = (
    click.option("--target", "-t", default=None, metavar="NAME", help="Machine; this one's GPU, or cpu, unless given."),
    click.option(
        "-a", "overrides", multiple=True, metavar="KEY=VALUE", help="Argument of the factory, or configuration field."
    ),
    click.option("--batch", type=click.IntRange(min=1), help="Sequences in the batch."),
    click.option("--seq", type=click.IntRange(min=1), help="Tokens in a sequence."),
    click.option("--weights", type=click.Choice(["auto", "random", "meta"]), default="auto", show_default=True),
)


spec_option = click.option(
    "--spec", "-s", default="deepseek_v3", show_default=True, metavar="NAME|FILE.fp8", help="Precision spec."
)


def with_model_options(command: Any) -> Any:
    for option in reversed(model_options):
        command = option(command)
    return command


@spec.command("check")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option(
    "--model", metavar="MODEL", help="Check on the training step of this model as well: what each rule matches."
)
@with_model_options
@as_json_option
def spec_check(
    specs: tuple[str, ...],
    model: str | None,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
    as_json: bool,
) -> int:
    """Check specs: syntax, names, conflicts between sections; with --model, everything.

    A SPEC is the name of a shipped spec or a .fp8 file; `fp8c compile --help` says what a MODEL is.
    """
    from fp8c.specs.summary import summarize

    results = [summarize(name) for name in specs]
    documents = [r.to_json() for r in results]
    code = ExitCode.OK if all(r.is_ok for r in results) else ExitCode.SPEC
    for result, document in zip(results, documents):
        if not as_json:
            print_diagnostics(result.diagnostics)
            if result.is_ok:
                print(result.text)
        if model is None or not result.is_ok:
            continue
        request = model_request(model, result.name, target, overrides, batch, seq, weights)
        from fp8c.tools.spec_command import check_on_model

        on_model = check_on_model(request)
        code = max(code, on_model.exit_code)
        document["on_model"] = on_model.to_json()
        if not as_json:
            print_diagnostics(on_model.diagnostics)
            print(on_model.text())
    if as_json:
        print_json("fp8c.spec-check/1", specs=documents)
    return int(code)


def model_request(
    model: str,
    spec: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
) -> Any:
    """What a verb is asked to do with a model; a wrong spec or target is reported before torch is imported."""
    check_inputs_exist(spec, target)
    from fp8c.models import parse_overrides
    from fp8c.tools.compile_command import Request

    return Request(
        model=model,
        spec=spec,
        target=target,
        out=None,
        overrides=parse_overrides(overrides),
        batch=batch,
        seq=seq,
        weights=weights,
        argv=("fp8c", *_arguments),
    )


@spec.command("lock")
@click.argument("spec_name", metavar="SPEC")
@click.option("--model", required=True, metavar="MODEL", help="The model to resolve the spec on.")
@click.option("--out", "-o", metavar="FILE", help="Write the lock here instead of stdout.")
@with_model_options
def spec_lock(
    spec_name: str,
    model: str,
    out: str | None,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
) -> int:
    """Print every decision of SPEC on a model with its reason, as `plan.lock.json` of a build holds it."""
    request = model_request(model, spec_name, target, overrides, batch, seq, weights)
    from fp8c.tools.spec_command import check_on_model

    result = check_on_model(request)
    print_diagnostics(result.diagnostics)
    if result.plan is None:
        return int(result.exit_code)
    text = json.dumps(result.plan.to_json(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        _replace_file(Path(out), text)
        print(f"{out}: {result.uses} uses, {result.plan.digest()[:16]}")
    return int(ExitCode.OK)


@spec.command("diff")
@click.argument("old")
@click.argument("new")
@click.option("--model", required=True, metavar="MODEL", help="The model to resolve both specs on.")
@with_model_options
@as_json_option
def spec_diff(
    old: str,
    new: str,
    model: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
    as_json: bool,
) -> int:
    """Say what NEW decides otherwise than OLD on a model, and by which rule; exit 1 when anything."""
    from fp8c.specs.load import load

    other = load(new)
    request = model_request(model, old, target, overrides, batch, seq, weights)
    from fp8c.specs.plan_diff import diff_plans, diff_text
    from fp8c.tools.spec_command import diff_on_model

    results = diff_on_model(request, other)
    for result in results:
        if result.plan is None:
            print_diagnostics(result.diagnostics)
            return int(result.exit_code)
    differences = diff_plans(results[0].plan, results[1].plan)  # type: ignore[arg-type]
    if as_json:
        print_json("fp8c.spec-diff/1", model=model, old=old, new=new, differences=[vars(d) for d in differences])
    elif differences:
        print(diff_text(differences))
    return int(ExitCode.CHECK_FAILED if differences else ExitCode.OK)


@spec.command("fmt")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--check", is_flag=True, help="Change nothing; exit 1 when a file would change.")
@click.option("--diff", is_flag=True, help="Change nothing; print what would change; exit 1 when anything would.")
def spec_fmt(files: tuple[str, ...], check: bool, diff: bool) -> int:
    """Print specs in their one layout, in place; - is stdin to stdout."""
    from fp8c.specs import formatter, parser

    has_change = False
    for file in files:
        if file == "-":
            text = sys.stdin.read()
            source = parser.source_of(text, "<stdin>")
        else:
            source = parser.read(Path(file), file)
            text = Path(file).read_bytes().decode("utf-8")  # with its byte order mark, and CR LF as they are
        formatted = formatter.format_source(source)
        if file == "-" and not (check or diff):
            sys.stdout.write(formatted)
            continue
        if formatted == text:
            continue
        has_change = True
        if diff:
            sys.stdout.write(formatter.diff(source, formatted))
        elif check:
            print(f"{file}: not formatted", file=sys.stderr)
        else:
            _replace_file(Path(file), formatted)
            print(f"{file}: formatted")
    return int(ExitCode.CHECK_FAILED if has_change and (check or diff) else ExitCode.OK)


def _replace_file(path: Path, text: str) -> None:
    """Write beside the file and swap in whole, so that a crash never leaves half a file."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@spec.command("new")
@click.argument("name")
@click.option(
    "--extends", default="deepseek_v3", show_default=True, metavar="SPEC", help="A shipped spec to start from."
)
def spec_new(name: str, extends: str) -> None:
    """Begin NAME.fp8, a spec that extends a shipped one."""
    from fp8c.specs.summary import new_spec

    path = Path(f"{name}.fp8")
    text = new_spec(name, extends)
    try:
        with path.open("x", encoding="utf-8", newline="\n") as f:
            f.write(text)
    except OSError as e:
        raise click.UsageError(f"cannot write {path}: {(e.strerror or str(e)).lower()}") from None
    print(f"{path}: extends {extends}; next: fp8c spec check {path}")


@spec.command("import")
@click.argument("source")
@click.option("--name", default="imported", show_default=True, help="The new spec's name.")
@click.option("--out", "-o", metavar="FILE", help="Write the spec here instead of stdout.")
@click.option(
    "--skip", multiple=True, metavar="TEXT", help="Keep modules whose path contains TEXT in BF16 (filter_fqns)."
)
@click.option(
    "--default", default="bf16", show_default=True, metavar="RECIPE", help="Megatron: modules that no matcher names."
)
def spec_import(source: str, name: str, out: str | None, skip: tuple[str, ...], default: str) -> None:
    """Write what another tool uses as a spec.

    SOURCE is te:RECIPE (Transformer Engine), torchao:RECIPE, a Hugging Face config.json with a quantization_config, or
    a YAML file for Megatron's --te-precision-config-file.
    """
    from fp8c.specs.importers import import_spec

    text = import_spec(source, name, default, skip)
    if out is None:
        sys.stdout.write(text)
        return
    _replace_file(Path(out), text)
    print(f"{out}: next: fp8c spec check {out}")


@spec.command("lsp")
@click.option("--model", default="", metavar="MODEL", help="Say what selectors match in this model; runs its code.")
@click.option("--target", "-t", default="cpu", show_default=True, metavar="NAME", help="Machine to check for.")
@click.option("-a", "overrides", multiple=True, metavar="KEY=VALUE", help="Argument of the model's factory.")
@click.option("--batch", type=click.IntRange(min=1), help="Sequences in the batch.")
@click.option("--seq", type=click.IntRange(min=1), help="Tokens in a sequence.")
def spec_lsp(model: str, target: str, overrides: tuple[str, ...], batch: int | None, seq: int | None) -> None:
    """Serve an editor over stdin and stdout: mistakes, what a selector matches, completion, layout."""
    from fp8c.backends.target import load_target

    load_target(target)
    try:
        from fp8c.tools.language_server import serve
    except ImportError:
        raise click.UsageError("the language server needs pygls: pip install 'fp8c[lsp]'") from None
    arguments = [word for override in overrides for word in ("-a", override)]
    arguments += ["--batch", str(batch)] if batch is not None else []
    arguments += ["--seq", str(seq)] if seq is not None else []
    serve(model, target, arguments)


@spec.command("list")
@as_json_option
def spec_list(as_json: bool) -> None:
    """List the specs that come with fp8c."""
    from fp8c.specs.load import load, shipped

    docs = {name: load(name).layers[-1].doc for name in shipped()}
    if as_json:
        print_json("fp8c.spec-list/1", specs=[{"name": name, "doc": doc} for name, doc in docs.items()])
        return
    width = max(map(len, docs))
    for name, doc in docs.items():
        print(f"{name:<{width}}  {doc.partition(chr(10))[0]}")


@spec.command("show")
@click.argument("name")
def spec_show(name: str) -> None:
    """Print the text of a shipped spec."""
    from fp8c.specs.load import shipped_text

    sys.stdout.write(shipped_text(name))


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
@click.option("--kernels", is_flag=True, help="Compile the step's Triton kernels for the target; needs no GPU.")
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
            argv=("fp8c", *_arguments),
        )
    )
    if time_passes:
        print(command.times_text(result), file=sys.stderr)
    if as_json:
        print_json(command.SCHEMA, **result.to_json())
    else:
        print(command.result_text(result))
    return int(result.exit_code)


def check_inputs_exist(spec: str, target: str | None) -> None:
    """Report a wrong spec or target before torch is imported, which takes seconds."""
    from fp8c.backends.target import load_target
    from fp8c.specs.load import load

    load(spec)
    if target is not None:
        load_target(target)


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
    check_inputs_exist(spec, target)
    from fp8c.models import parse_overrides
    from fp8c.tools import compile_command, opt_command

    request = compile_command.Request(
        model=model,
        spec=spec,
        target=target,
        out=None,
        overrides=parse_overrides(overrides),
        batch=batch,
        seq=seq,
        weights=weights,
        argv=("fp8c", *_arguments),
    )
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
@click.option("--limit", type=click.FloatRange(min=0), help="--bisect: the largest error that is fine.")
@click.option(
    "--budget", type=click.FloatRange(min=0), help="--search: the largest error; half of what formats explain."
)
@click.option("--inject", metavar="FAULT", default="", help="Break an operand, for example scale:layers.1.up:fprop.x.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Page (.html), picture (.svg) or document (.json).")
@click.option("--spec-out", type=click.Path(path_type=Path), help="--search: the new spec; searched.fp8 unless given.")
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
@click.option("--gpus", type=int, default=2048, show_default=True)
@click.option("--topology", default="h800", show_default=True, help="Machine: a name, or a cost sheet of your own.")
@click.option("--pp", type=int, help="Pipeline ranks.")
@click.option("--ep", type=int, help="GPUs that share the experts.")
@click.option("--schedule", help="1f1b, interleaved, zb, zbv, dualpipe or dualpipev.")
@click.option("--sequences", type=int, help="Sequences of one optimizer step.")
@click.option("--comm-sms", type=int, help="SMs that communication gets.")
@click.option("--choose-sms", is_flag=True, help="Give communication the SMs with which a pair is shortest.")
@click.option("--zipf", type=float, default=0.0, show_default=True, help="Exponent of expert popularity.")
@click.option("--loads", type=click.Path(path_type=Path), help="JSON list of measured tokens per expert.")
@click.option("--even", is_flag=True, help="Exactly even routing, without sampling noise.")
@click.option("--overlap/--no-overlap", default=True, help="Let transfers run beside compute.")
@click.option("--released", is_flag=True, help="Chunks without a partner run as fast as alone.")
@click.option("--predict", is_flag=True, help="Take durations from the cost model, not from the table.")
@click.option("--memory-gib", type=float, help="Budget for activations on one GPU.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--what-if", is_flag=True, help="Say what each of the hardware wishes would save.")
@click.option("--figures", type=click.Path(path_type=Path), help="Draw the pictures of docs/overlap.md into a folder.")
@click.option("--trace", type=click.Path(path_type=Path), default=Path("simulate.trace.json"), show_default=True)
@as_json_option
def simulate(
    build: Path | None, durations: Path | None, gpus: int, topology: str, as_json: bool, **options: Any
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


for command in build_commands.COMMANDS:
    app.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
