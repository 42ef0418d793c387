"""The commands as Python calls: the same names and the same arguments as on the command line.

Every call that works on a configuration takes the path of a YAML file or the same as a mapping, `set` (assignments such
as "attack.poison_rate=0.005"), `seed`, and the `Options`; where something is trained, also `engine` ("fast" or
"reference"), which overrules the victim's and the surrogate's. Errors are `BltoError`s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from blto import doctor, experiment, poisoning
from blto.attacks.base import poison_with
from blto.attacks.crafting import SURROGATE
from blto.configuration import AnyPath, Config, Options, environment, read_spec, read_specs
from blto.errors import ConfigError
from blto.evaluation import evaluate_backdoor
from blto.experiment.outcome import ENCODER, TRIGGER
from blto.files import atomic_write, read_bytes
from blto.models import foreign
from blto.models.encoder import Encoder
from blto.poisoning import Trigger, VerifyReport, apply_to_uint8, write_poisoned
from blto.poisoning.manifest import Layout
from blto.pretraining.spec import Engine, RecipeSpec
from blto.records import Metric, RunRecord, RunStore
from blto.report import build_report
from blto.report.figures import folder_of, recorded_figures
from blto.sweep.plan import read_sweep
from blto.sweep.running import Conditions, SweepResult, export_sweep, run_sweep


def run(
    config: Config,
    *,
    set: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> list[RunRecord]:
    """Run one experiment to its record: craft, poison, pretrain victim and clean twin, evaluate.

    The attacks that the configuration lists under `controls` follow, on the same data, seed and clean twin, and with
    the attack's own options wherever they share one. A run that is already in the store is not run again.

    Returns:
        The attack's record, then those of its controls.
    """
    return experiment.run_all(read_specs(config, set, seed, engine), environment(**options))


def craft(
    config: Config,
    out: AnyPath | None = None,
    *,
    check: bool = False,
    encoder: Sequence[AnyPath] = (),
    count: int = 2000,
    set: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> Path:
    """Learn the trigger of a configuration; returns the file, which is `out` where that is given.

    With `check` it is measured as well, as by `check_trigger`, whose arguments `encoder` and `count` are.
    """
    if encoder and not check:
        raise ConfigError("encoder: is for the check of the trigger; give check as well.")
    spec, where = read_spec(config, set, seed, engine), environment(**options)
    known = doctor.prepared(encoder, count)  # a mistake shows before anything is learned
    data = experiment.load_data(spec, where)
    if bilevel := spec.attack.get("bilevel"):
        experiment.say_engine("surrogates", RecipeSpec.model_validate(bilevel["surrogate"]), data.attacker, where)
    stage = experiment.craft_stage(spec, data, where)
    file = _delivered(stage.path / TRIGGER, out)
    if check:
        doctor.examine(spec, data, file, where, surrogate=stage.path / SURROGATE, encoders=known, count=count)
    return file


def check_trigger(
    config: Config,
    trigger: AnyPath,
    *,
    encoder: Sequence[AnyPath] = (),
    count: int = 2000,
    set: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Measure a trigger before any victim is trained; returns what `doctor.examine` finds and writes beside the file.

    Args:
        config, set, seed, engine, options: as in `run`.
        trigger: its file; where `surrogate.safetensors` lies beside it, that is taken for its surrogate.
        encoder: files of clean encoders to measure it on; without any, one is pretrained.
        count: training images to measure on, at most half of them; the test set is not read.
    """
    spec, where = read_spec(config, set, seed, engine), environment(**options)
    known, file = doctor.prepared(encoder, count), Path(trigger)
    data = experiment.load_data(spec, where)
    return doctor.examine(spec, data, file, where, surrogate=file.parent / SURROGATE, encoders=known, count=count)


def poison(
    config: Config,
    out: AnyPath,
    *,
    trigger: AnyPath | None = None,
    layout: Layout = "parquet",
    set: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> Path:
    """Write the poisoned training set of a configuration to the new folder `out`, with manifest and marker.

    Args:
        config, set, seed, engine, options: as in `run`.
        out: a new or empty folder outside of the source data.
        trigger: an existing trigger file; else the configuration's own is crafted, or taken from the store.
        layout: "parquet" or "png".
    """
    spec, where = read_spec(config, set, seed, engine), environment(**options)
    data = experiment.load_data(spec, where)
    attack = experiment.build_attack(spec, data)
    file = Path(trigger) if trigger is not None else experiment.craft_stage(spec, data, where).path / TRIGGER
    pattern = poisoning.load_trigger(file)
    dataset = poison_with(attack, pattern, data.train, seed=spec.seed)
    path = spec.data.get("path")
    write_poisoned(
        dataset,
        pattern,
        seeds={"run": spec.seed},
        out=Path(out),
        layout=layout,
        source=(where.data_root or Path()) / path if isinstance(path, str) else None,
    )
    return Path(out)


def pretrain(
    config: Config,
    out: AnyPath | None = None,
    *,
    poisoned: bool = False,
    set: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> Path:
    """Train an encoder on a configuration's data as they are; returns the file, which is `out` where that is given.

    Args:
        config, set, seed, engine, options: as in `run`; `attack` may be missing and plays no part.
        out: the encoder file to write.
        poisoned: permit a set that is marked as poisoned.

    Raises:
        Mismatch: the data are marked as poisoned and `poisoned` is not set.
    """
    spec, where = read_spec(config, set, seed, engine, attack={"name": "clean"}), environment(**options)
    images, _ = experiment.load_train(spec, where, poisoned=poisoned)
    experiment.say_engine("pretraining", spec.recipe, images, where)
    stage = experiment.pretrain_stage(spec, images.without_labels(), where)
    return _delivered(stage.path / ENCODER, out)


def evaluate(
    config: Config,
    *,
    encoder: AnyPath,
    clean_twin: AnyPath,
    trigger: AnyPath,
    set: Sequence[str] = (),
    seed: int | None = None,
    **options: Unpack[Options],
) -> dict[str, dict[str, Metric]]:
    """Measure an encoder beside its clean twin: probe -> metric -> value with interval and n.

    Args:
        config, set, seed, options: as in `run`; data, probes and the attack's target class are used. The encoders
            run on `device`; the trigger stays on the CPU, so that the images are the same on every device.
        encoder, clean_twin, trigger: safetensors files that blto wrote.
    """
    spec, where = read_spec(config, set, seed), environment(**options)
    network, twin = (load_encoder(each).to(where.device) for each in (encoder, clean_twin))
    at_test = load_trigger(trigger).at_test()
    data = experiment.load_data(spec, where)
    return evaluate_backdoor(
        network,
        twin,
        train=data.train,
        test=data.test,
        triggered=apply_to_uint8(at_test, data.test.images),
        target_class=experiment.build_attack(spec, data).target_class,
        probes=spec.probes,
    ).metrics


def sweep(
    file: AnyPath,
    *,
    max_hours: float | None = None,
    expected_hours: float | None = None,
    executor: str = "serial",
    workers: int | None = None,
    retry_failed: bool = False,
    export: AnyPath | None = None,
    **options: Unpack[Options],
) -> SweepResult:
    """Run the cells of a sweep that are not done yet, each an experiment on one store; see docs/sweeps.md.

    A call goes on where an earlier one stopped, however it ended. A failed cell does not end the sweep, and is not an
    exception here: the result's `error` says so.

    Args:
        file: a YAML file with a base configuration and a grid, cells or seeds.
        max_hours: no cell is begun that is not expected to end by then, and what runs then stops at its next
            checkpoint; None runs to the end.
        expected_hours: how long a cell takes, until one is done; else what the file says.
        executor: "serial" or "processes", where each worker has one core and one thread.
        workers: of "processes"; one for each core by default.
        retry_failed: run cells again that have failed.
        export: run nothing; copy record, log, encoders and trigger of the finished cells to this folder.
        options: as in `run`; `resume` plays no part, a sweep always does.
    """
    where, plan = environment(**options), read_sweep(Path(file))
    if export is not None:
        return export_sweep(plan, where.store.root, Path(export))
    conditions = Conditions(
        where.store.root,
        data_root=where.data_root,
        device=where.device,
        executor=executor,
        workers=workers,
        max_hours=max_hours,
        expected_hours=expected_hours,
        retry_failed=retry_failed,
        quiet=where.progress.quiet,
    )
    return run_sweep(plan, conditions)


def report(runs: Sequence[AnyPath] = (), *, out: AnyPath = "report.html", store: AnyPath = "runs") -> Path:
    """Write one HTML page about some runs; returns it.

    Args:
        runs: run ids of the store, run folders or record files; none is every run of the store.
        out: the page.
        store: folder of the runs.

    Raises:
        ConfigError: there is no run.
        Mismatch: a figure is not the one that the record vouches for.
    """
    known = RunStore(Path(store))
    found = [(known.load(os.fspath(each)), folder_of(each, known)) for each in runs]
    if not runs:
        found = [(record, known.folder(record.run_id)) for record in known.list()]
    figures = {record.run_id: recorded_figures(record, folder) for record, folder in found}
    return build_report([record for record, _ in found], figures, Path(out))


def verify(path: AnyPath) -> VerifyReport:
    """Check a poisoned set against its manifest. Raises Mismatch with the first image that differs."""
    return poisoning.verify(Path(path))


def load_record(path: AnyPath) -> RunRecord:
    """The record of a run, from its folder or its `record.json`."""
    return RunStore(Path()).load(Path(path))


def load_trigger(path: AnyPath) -> Trigger:
    """A trigger from its file: a module, images (B, 3, H, W) in [0, 1] -> the same, triggered.

    It makes poisons; `load_trigger(path).at_test()` is what test images get, which for some attacks is another.
    """
    return poisoning.load_trigger(Path(path))


def load_encoder(path: AnyPath, arch: str | None = None, **options: Any) -> Encoder:
    """An encoder from its file: a module in eval mode, images (B, 3, H, W) in [0, 1] -> features (B, D).

    With `arch`, one that others have trained: see `models.foreign.import_encoder`, whose arguments `options` are.
    """
    return foreign.load(Path(path), arch, **options)


def _delivered(file: Path, out: AnyPath | None) -> Path:
    """The stage's own file, or a copy of it where one was asked for."""
    if out is None:
        return file
    atomic_write(Path(out), read_bytes(file))
    return Path(out)
