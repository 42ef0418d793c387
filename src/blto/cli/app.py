"""The commands. Each is a thin call of the function of the same name in `blto`; help imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import blto
from blto.cli import output, scan
from blto.cli.arguments import (
    ConfigFile,
    DataRoot,
    Device,
    DeviceOption,
    EngineOption,
    Executor,
    Json,
    Layout,
    OutFile,
    OwnSeed,
    Quiet,
    Resume,
    Seed,
    Set,
    Store,
    choices,
    surroundings,
    word,
)

app = typer.Typer(
    name="blto",
    help="Backdoors in contrastive pretraining: craft them, measure them, defend against them.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


app.add_typer(scan.app, name="scan")


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Without a command: the help, as an answer and not as an error."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and report.html.")] = Path("runs/demo"),
    seed: OwnSeed = 0,
    engine: EngineOption = None,
    device: DeviceOption = Device.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn a trigger, poison, pretrain and measure on embedded data, in minutes."""
    records = blto.demo(out=out, seed=seed, engine=word(engine), device=device.value, resume=resume, quiet=quiet)
    output.print_records(records, as_json=as_json, page=out / "report.html")


@app.command()
def run(
    config: ConfigFile,
    set_: Set = None,
    seed: Seed = None,
    engine: EngineOption = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run one experiment: trigger, poisons, victim and clean twin, metrics, record."""
    options = surroundings(store, data_root, device, resume, quiet)
    output.print_records(blto.run(config, **choices(set_, seed, engine), **options), as_json=as_json)


@app.command()
def craft(
    config: ConfigFile,
    out: OutFile = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also measure it on its surrogate and on clean encoders, before any victim.")
    ] = False,
    encoder: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A clean encoder for the check, instead of a new one; may be given again."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Training images that the check measures on, at most.")] = 2000,
    set_: Set = None,
    seed: Seed = None,
    engine: EngineOption = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn the trigger alone; prints its file."""
    options = {**surroundings(store, data_root, device, resume, quiet), **choices(set_, seed, engine)}
    file = blto.craft(config, out, check=check, encoder=encoder or (), count=count, **options)
    if check:
        output.print_check(file, as_json=as_json)
    else:
        output.print_path("trigger", file, as_json=as_json)


@app.command()
def poison(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="New folder for the poisoned set.", show_default=False)],
    trigger: Annotated[
        Path | None, typer.Option(help="A trigger file; else the configuration's own.", show_default=False)
    ] = None,
    layout: Annotated[Layout, typer.Option(help="One parquet file, or a PNG for each image.")] = Layout.PARQUET,
    set_: Set = None,
    seed: Seed = None,
    engine: EngineOption = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the poisoned training set, with manifest and marker."""
    options = surroundings(store, data_root, device, resume, quiet)
    folder = blto.poison(config, out, trigger=trigger, layout=layout.value, **choices(set_, seed, engine), **options)
    output.print_path("poisoned", folder, as_json=as_json)


@app.command()
def pretrain(
    config: ConfigFile,
    out: OutFile = None,
    poisoned: Annotated[bool, typer.Option("--poisoned", help="Permit a set that is marked as poisoned.")] = False,
    set_: Set = None,
    seed: Seed = None,
    engine: EngineOption = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an encoder on the data as they are; prints its file."""
    options = surroundings(store, data_root, device, resume, quiet)
    file = blto.pretrain(config, out, poisoned=poisoned, **choices(set_, seed, engine), **options)
    output.print_path("encoder", file, as_json=as_json)


@app.command()
def evaluate(
    config: ConfigFile,
    encoder: Annotated[Path, typer.Option(help="The encoder under test.", show_default=False)],
    clean_twin: Annotated[Path, typer.Option(help="The same without poison.", show_default=False)],
    trigger: Annotated[Path, typer.Option(help="The trigger file.", show_default=False)],
    set_: Set = None,
    seed: Seed = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure an encoder beside its clean twin."""
    options = surroundings(store, data_root, device, False, quiet)
    metrics = blto.evaluate(
        config, encoder=encoder, clean_twin=clean_twin, trigger=trigger, set=set_ or (), seed=seed, **options
    )
    output.print_metrics(metrics, as_json=as_json)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file: base, grid, cells, seeds.")],
    max_hours: Annotated[float | None, typer.Option(help="Stop in time; without it, to the end.")] = None,
    expected_hours: Annotated[float | None, typer.Option(help="Of a cell, until one is done.")] = None,
    executor: Annotated[Executor, typer.Option(help="Where the cells run.")] = Executor.SERIAL,
    workers: Annotated[int | None, typer.Option(help="Of processes, each with one core.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(help="Run nothing; copy records, logs, encoders and triggers of finished cells to here."),
    ] = None,
    store: Store = Path("runs"),
    data_root: DataRoot = None,
    device: DeviceOption = Device.AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run many experiments as one queue that goes on after every stop."""
    result = blto.sweep(
        file,
        max_hours=max_hours,
        expected_hours=expected_hours,
        executor=executor.value,
        workers=workers,
        retry_failed=retry_failed,
        export=export,
        **surroundings(store, data_root, device, True, quiet),
    )
    output.print_sweep(result, as_json=as_json)
    if result.error is not None:
        raise result.error


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Run ids, run folders or record files; none is all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    store: Store = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write one HTML page about runs; prints its path."""
    output.print_path("report", blto.report(runs or (), out=out, store=store), as_json=as_json)


@app.command("list")
def list_command(
    kind: Annotated[
        str | None,
        typer.Argument(help="attack, defense, method, backbone, generator, dataset or run.", show_default=False),
    ] = None,
    store: Store = Path("runs"),
    as_json: Json = False,
) -> None:
    """List every component and every run."""
    output.print_listing(blto.list(kind, store=store), as_json=as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name that `blto list` prints; kind:name where two share it.")],
    as_json: Json = False,
) -> None:
    """Show one component: its card, and every option with type, range and default."""
    output.print_component(blto.show(name), as_json=as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The folder of a poisoned set that blto wrote.")],
    as_json: Json = False,
) -> None:
    """Check a poisoned set against its manifest."""
    output.print_verified(path, asdict(blto.verify(path)), as_json=as_json)
