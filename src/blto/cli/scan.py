"""`blto scan`: audits that end in a verdict, which the exit code repeats: 0 clean, 1 suspect, 8 inconclusive."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import blto
from blto.cli import output
from blto.cli.arguments import DataRoot, Device, DeviceOption, Json, OwnSeed, PageFile, Quiet, SarifFile, Store
from blto.errors import ConfigError
from blto.files import show
from blto.files.yaml import parse_value


class DataExecutor(StrEnum):
    """Where the images of a scan are read."""

    SERIAL = "serial"
    PROCESSES = "processes"
    RAY = "ray"


app = typer.Typer(help="Is it backdoored, and how sure is that?", no_args_is_help=True, rich_markup_mode="rich")


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
    page: PageFile = None,
    sarif: SarifFile = None,
    seed: OwnSeed = 0,
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


@app.command()
def data(
    images: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of images, with or without class folders; or a data set.")
    ],
    clean: Annotated[
        str | None,
        typer.Option(help="Images of the same kind that are known to be clean, likewise.", show_default=False),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="A detector, or {name: repeated_windows, window: 7}; may be given again.", show_default=False
        ),
    ] = None,
    drill: Annotated[float, typer.Option(metavar="RATE", help="Poison such a share of clean images, and scan.")] = 0.0,
    alpha: Annotated[float, typer.Option(help="Chance at which clean images may be called suspect.")] = 0.05,
    skip_bad: Annotated[int, typer.Option(metavar="N", help="Leave out up to N images that cannot be read.")] = 0,
    image_size: Annotated[
        int | None,
        typer.Option(min=8, max=1024, help="Of the squares for frequencies; else as the images.", show_default=False),
    ] = None,
    executor: Annotated[DataExecutor, typer.Option(help="Where the images are read.")] = DataExecutor.SERIAL,
    workers: Annotated[int | None, typer.Option(help="Of processes, or on Ray.", show_default=False)] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, host:port; else one is started here.", show_default=False)
    ] = None,
    page: PageFile = None,
    sarif: SarifFile = None,
    seed: OwnSeed = 0,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look for traces of poisoning in unlabeled images, beside clean ones."""
    found = blto.scan_data(
        _place_or_mapping(images, "DIR"),
        clean=None if clean is None else _place_or_mapping(clean, "--clean"),
        detectors=[parse_value(each, "--detector") for each in detector] if detector else None,
        drill=drill,
        alpha=alpha,
        seed=seed,
        skip_bad=skip_bad,
        image_size=image_size,
        executor=executor.value,
        workers=workers,
        address=address,
        page=page,
        sarif=sarif,
        store=store,
        data_root=data_root,
        quiet=quiet,
    )
    output.print_data_scan(found, page=page, as_json=as_json)
    raise typer.Exit(found.judgement.verdict.exit_code)


def _place_or_mapping(given: str, where: str) -> Any:
    """A mapping where it is written as one; else a folder or a name, as it stands."""
    return parse_value(given, where) if given.startswith("{") else given
