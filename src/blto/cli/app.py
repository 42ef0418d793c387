"""The commands. Each is a thin call of the function of the same name in `blto`; help imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import blto
from blto.cli import catalog, output

app = typer.Typer(
    name="blto",
    help="Backdoors in contrastive pretraining: craft them, measure them, defend against them.",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Without a command: the help, as an answer and not as an error."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list")
def list_command(
    kind: Annotated[str | None, typer.Argument(help="attack, method, backbone, generator or dataset.")] = None,
    as_json: Json = False,
) -> None:
    """List every component: attacks, pretraining methods, backbones, generators, datasets."""
    listing = catalog.list_components(kind)
    if as_json:
        output.print_json(listing)
    else:
        output.print_text(output.components_table(listing))


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A component's name, as `blto list` prints it; kind:name where two share it.")
    ],
    as_json: Json = False,
) -> None:
    """Show one component: its card, and every option with type, range and default."""
    component = blto.show(name)
    if as_json:
        output.print_json(component)
    else:
        for item in output.component_text(component):
            output.print_text(item)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The folder of a poisoned set that blto wrote.")],
    as_json: Json = False,
) -> None:
    """Check a poisoned set against its manifest; exit 6 names the first image that differs."""
    found = blto.verify(path)
    if as_json:
        output.print_json(asdict(found))
    else:
        output.print_text(
            f"{path}: as recorded. {found.n_images} images, {found.n_poisoned} of them poisoned "
            f"({100 * found.poison_rate:.3g}%, class {found.target_class_name}, "
            f"largest change {255 * found.epsilon_reached:.3g}/255)."
        )
