"""The verbs that read builds: inspect, export, explain, diff. None of them imports torch or runs a model's code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fp8c.command_options import as_json_option, print_json
from fp8c.diagnostics import ExitCode, Severity
from fp8c.files import write_file

#: `fp8c export`'s formats, spelt here so that --help reads no build code; tests compare them with the table.
EXPORT_FORMATS = ("perfetto", "model-explorer", "dot")
#: The one format of weights instead of a build.
CHECKPOINT_FORMAT = "hf"


@click.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the page here instead of opening it.")
@click.option("--text", "as_text", is_flag=True, help="Print modules and tables instead.")
@click.option("--only", default="", metavar="PART", help="--text: modules whose path contains PART.")
def inspect(build: Path, out: Path | None, as_text: bool, only: str) -> None:
    """Show what was done to a model: the graph, formats, saved bytes, schedule, as one page in the browser.

    The page is one HTML file that needs no network.
    """
    from fp8c.build import read_build

    read = read_build(build)
    if as_text:
        from fp8c.tools.viewer.text import inspect_text

        print(inspect_text(read, only))
        return
    from fp8c.tools.viewer.page import page
    from fp8c.tools.viewer.page_data import page_data

    content = page(page_data(read))
    if out is not None:
        write_file(out, content)
        print(f"{out}: {len(content) / 1e6:.2f} MB")
        return
    import tempfile
    import webbrowser

    with tempfile.NamedTemporaryFile("wb", prefix="fp8c-", suffix=".html", delete=False) as file:
        file.write(content)
    if not webbrowser.open(Path(file.name).as_uri()):
        print("no browser to open it with; -o FILE writes it where you want it", file=sys.stderr)
    print(file.name)


@click.command()
@click.argument("build", metavar="BUILD|MODEL")
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--format", "format_name", required=True, type=click.Choice((*EXPORT_FORMATS, CHECKPOINT_FORMAT)))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Where to; a name in this folder unless given.")
@click.option("--spec", "-s", default="deepseek_v3", show_default=True, metavar="NAME|FILE.fp8", help="hf: of a MODEL.")
@click.option("-a", "overrides", multiple=True, metavar="KEY=VALUE", help="hf: configuration field of a MODEL.")
@click.option("--ema", is_flag=True, help="hf: the moving average instead of the parameters.")
@click.option("--mtp", is_flag=True, help="hf: keep the multi-token-prediction layers, left out otherwise.")
@click.option("--partial-blocks", is_flag=True, help="hf: quantize weights with a partial block as well.")
@click.option("--force", is_flag=True, help="hf: replace a folder that fp8c did not write.")
def export(build: str, checkpoint: Path | None, format_name: str, out: Path | None, **options: Any) -> None:
    """Write BUILD for another tool: a trace for Perfetto, JSON for Model Explorer, Graphviz.

    --format hf writes a training run's CHECKPOINT as an FP8 Hugging Face checkpoint; the first argument is then the build
    it was trained with, or an hf: model as `fp8c compile` takes it.
    """
    if format_name == CHECKPOINT_FORMAT:
        export_checkpoint(build, checkpoint, out or Path("hf"), **options)
        return
    from fp8c.build import read_build
    from fp8c.tools.viewer.export import export as run

    print(run(read_build(Path(build)), format_name, out))


def export_checkpoint(
    model: str,
    checkpoint: Path | None,
    out: Path,
    *,
    spec: str,
    overrides: tuple[str, ...],
    ema: bool,
    mtp: bool,
    partial_blocks: bool,
    force: bool,
) -> None:
    if checkpoint is None:
        raise click.UsageError("--format hf takes a build or model, and a checkpoint of its training")
    from fp8c.diagnostics import render
    from fp8c.models import parse_overrides
    from fp8c.tools.export_hf import ExportRequest
    from fp8c.tools.export_hf import export as run

    exported = run(
        ExportRequest(
            model=model,
            checkpoint=checkpoint,
            out=out,
            spec=spec,
            overrides=parse_overrides(overrides),
            source="ema" if ema else "model",
            mtp=mtp,
            partial_blocks=partial_blocks,
            force=force,
        )
    )
    for remark in exported.remarks:
        print(render(remark), file=sys.stderr)
    print(exported.text())


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="CODE | BUILD WHAT")
@as_json_option
def explain(what: tuple[str, ...], as_json: bool) -> int:
    """Say what a diagnostic's CODE means, or why BUILD decided as it did about WHAT.

    WHAT is a module or use (model.layers.3.mlp.gate), a pattern ("model.layers.*.mlp.gate"), a selector of the spec
    language ("kind(moe) & op(grouped_mm)"), a node of a graph (scaled_mm_default_4) or a section (dispatch.payload).
    """
    first, *rest = what
    if rest:
        return explain_build(first, " ".join(rest), as_json)
    if Path(first).is_dir():
        raise click.UsageError(f"say what to explain of {first}: a module, a node or a selector")
    return explain_code(first.upper(), as_json)


def explain_build(build: str, what: str, as_json: bool) -> int:
    from fp8c.build import read_build
    from fp8c.tools import explain as tool

    found = tool.explain(read_build(build), what)
    if as_json:
        print_json(tool.SCHEMA, what=what, explanations=[e.to_json() for e in found])
    else:
        print(tool.explanation_text(found))
    return int(ExitCode.OK)


def explain_code(code: str, as_json: bool) -> int:
    from fp8c.error_codes import EXPLANATIONS

    text = EXPLANATIONS.get(code)
    if text is None:
        import difflib

        close = difflib.get_close_matches(code, EXPLANATIONS, 3, 0.6)
        raise click.UsageError(f"no diagnostic has the code {code}" + (f"; near: {', '.join(close)}" if close else ""))
    severity = {"E": Severity.ERROR, "W": Severity.WARNING}.get(code[0], Severity.REMARK).value
    if as_json:
        print_json("fp8c.explanation/1", code=code, severity=severity, text=text)
    else:
        import textwrap

        print(f"{severity} {code}\n\n{textwrap.fill(text, 96)}")
    return int(ExitCode.OK)


@click.command()
@click.argument("old")
@click.argument("new")
@as_json_option
def diff(old: str, new: str, as_json: bool) -> int:
    """Say what build NEW decides, saves, casts and says otherwise than build OLD; exit 1 when anything.

    NEW may be a spec, by name or file: then it is resolved on the operator uses and the target of OLD.
    """
    from fp8c.tools import build_diff as tool

    found = tool.compare(old, new)
    if as_json:
        print_json(tool.SCHEMA, old=old, new=new, **found.to_json())
    else:
        print(tool.comparison_text(found))
    return int(ExitCode.OK if found.is_same else ExitCode.CHECK_FAILED)


COMMANDS = (inspect, export, explain, diff)
