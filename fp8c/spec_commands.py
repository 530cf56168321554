"""`fp8c spec ...`: check, format, write, import, compare specs, serve an editor. torch is imported with a model only."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from fp8c.command_options import as_json_option, model_request, print_diagnostics, print_json, with_model_options
from fp8c.diagnostics import ExitCode
from fp8c.files import reason, write_file


@click.group()
def spec() -> None:
    """Work with precision specs (*.fp8)."""


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
        write_file(Path(out), text)
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
            data = sys.stdin.buffer.read()
            source = parser.decoded(data, "<stdin>")
            text = data.decode()
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
            lines = formatter.diff(source, formatted)
            sys.stdout.write(lines or f"{file}: its byte order mark or line ends would change\n")
        elif check:
            print(f"{file}: not formatted", file=sys.stderr)
        else:
            write_file(Path(file), formatted)
            print(f"{file}: formatted")
    return int(ExitCode.CHECK_FAILED if has_change and (check or diff) else ExitCode.OK)


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
        raise click.UsageError(f"cannot write {path}: {reason(e)}") from None
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
    write_file(Path(out), text)
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
    margin = " " * (max(map(len, docs)) + 2)
    wrapper = textwrap.TextWrapper(break_long_words=False, break_on_hyphens=False, subsequent_indent=margin)
    wrapper.width = max(len(margin) + 30, min(100, shutil.get_terminal_size().columns))
    for name, doc in docs.items():
        summary = " ".join(doc.partition("\n\n")[0].split())
        print(wrapper.fill(f"{name:<{len(margin)}}{summary}"))


@spec.command("show")
@click.argument("name")
def spec_show(name: str) -> None:
    """Print the text of a shipped spec."""
    from fp8c.specs.load import shipped_text

    sys.stdout.write(shipped_text(name))
