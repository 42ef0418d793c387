"""`blto scan`: audits that end in a verdict, which the exit code repeats: 0 clean, 1 suspect, 8 inconclusive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import blto
from blto.cli import output
from blto.cli.arguments import DataRoot, Device, DeviceOption, Json, Quiet, Store
from blto.errors import ConfigError
from blto.files import show
from blto.files.yaml import parse_value

app = typer.Typer(help="Is it backdoored, and how sure is that?", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _group() -> None:
    """So that there are commands below `scan`, even while there is one."""


@app.command()
def encoder(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The encoder; nothing in it is run.")],
    arch: Annotated[
        str | None,
        typer.Option(
            help="Architecture of a file that others wrote: timm/NAME, torchvision/NAME, resnet18.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Clean images: a data set, or {name: image_folder, path: DIR, image_size: 224}.")
    ] = "cifar10",
    clean: Annotated[
        list[Path] | None,
        typer.Option(
            help="A clean encoder of the same family; give 19 or more, each with --clean.", show_default=False
        ),
    ] = None,
    clean_dir: Annotated[
        Path | None, typer.Option(help="A folder of clean encoders, searched for *.safetensors.", show_default=False)
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(help="A detector, or {name: decree, starts: 3}; may be given again.", show_default=False),
    ] = None,
    drill: Annotated[int, typer.Option(min=0, help="Tamper with so many clean encoders and scan them as well.")] = 0,
    alpha: Annotated[float, typer.Option(help="Share of clean encoders that may be called suspect.")] = 0.05,
    key_prefix: Annotated[
        str | None, typer.Option(help="With --arch: which of several nets in the file.", show_default=False)
    ] = None,
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="With --arch: of the channels.", show_default=False)
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="With --arch: of the channels.", show_default=False)
    ] = None,
    page: Annotated[Path | None, typer.Option(help="An HTML page to write.", show_default=False)] = None,
    sarif: Annotated[Path | None, typer.Option(help="A SARIF file to write.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every choice.")] = 0,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let detectors look at an encoder, beside clean ones of its family."""
    given = {"key_prefix": key_prefix, "mean": mean, "std": std}
    in_folder = sorted(clean_dir.rglob("*.safetensors")) if clean_dir else []
    if clean_dir and not in_folder:
        raise ConfigError(
            f"--clean-dir {show(clean_dir)}: there is no *.safetensors in it; give a folder that has some."
        )
    found = blto.scan(
        file,
        arch,
        data=parse_value(data, "--data"),
        clean=[*(clean or ()), *in_folder],
        detectors=[parse_value(each, "--detector") for each in detector] if detector else None,
        drill=drill,
        alpha=alpha,
        seed=seed,
        page=page,
        sarif=sarif,
        foreign={name: value for name, value in given.items() if value is not None},
        store=store,
        data_root=data_root,
        device=device.value,
        quiet=quiet,
    )
    output.print_scan(found, page=page, as_json=as_json)
    raise typer.Exit(found.judgement.verdict.exit_code)
