"""What is known about a finished run, and the folders it lives in.

A `RunRecord` is the only thing that tables, figures and the report are made from. A `RunStore` is a directory of runs:

    <store>/<run id>/record.json        written last: a run without it has not happened
                     log.jsonl  spec.yaml  trigger.safetensors  encoder.safetensors  poison_manifest.json  figures/
    <store>/stages/<kind>-<hash>/       the result of one stage, under the hash of what it was made from

Records carry their own checksum, so an altered number is refused, never shown. They are made to be shared: the home
directory, the user's name in a path and the host's name are taken out before anything is stored.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blto.errors import ConfigError, InputRefused, Mismatch
from blto.files.atomic import (
    canonical_json,
    make_directory,
    read_json,
    remove_file,
    sha256_bytes,
    sha256_file,
    write_json,
)
from blto.files.locks import DirectoryLock
from blto.files.paths import safe_join
from blto.files.text import show

SCHEMA_VERSION = 1
RESULTS_VERSION = 2  # of stages; raised when the same inputs come to give another result, so that no old one is found
HEADLINE_PROBE = "linear"
TOOK_LIFT = 0.5  # an attack "took" when it adds at least this much to the best innocent explanation

_HOMES = re.compile(r"(?<![\w.])(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/\s:]+")


class Metric(BaseModel):
    """A fraction with its interval and the number of images behind it; `value` is None where it cannot be computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None
    n: Annotated[int, Field(ge=0)]


class RunRecord(BaseModel):
    """Everything that a finished run has to say. JSON on disk, plain numbers and text only.

    Attributes:
        schema_version: 1; a newer one is refused with Mismatch.
        run_id: the folder's name, see `RunStore.run_id`.
        spec: the resolved spec, every default filled in.
        metrics: probe ("linear", "knn") -> name ("asr", "lift", ...) -> Metric.
        took: whether `metrics.linear.lift.value` is at least 0.5; a record that says otherwise is refused.
        similarity: trigger-target cosine similarities of the final encoder ("raw", "centred", "normalised").
        stealth: "linf", "psnr" (dB), "ssim" and more, of triggered against clean test images.
        trajectory: one entry per observed epoch of the victim: "epoch" and what was measured.
        trajectory_clean_twin: the same for the clean twin.
        crafting: one entry per observed step of the trigger's training: "step" and what the surrogate showed.
        provenance: versions, hashes, seeds, device, times.
        artefacts: file name inside the run's folder -> sha256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
    spec: dict[str, Any]
    metrics: dict[str, dict[str, Metric]]
    took: bool
    similarity: dict[str, float] = {}
    stealth: dict[str, float] = {}
    trajectory: list[dict[str, Any]] = []
    trajectory_clean_twin: list[dict[str, Any]] = []
    crafting: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {}
    artefacts: dict[str, str] = {}
    status: Literal["ok"] = "ok"

    @field_validator("spec", "provenance", mode="before")
    @classmethod
    def _remove_private_text(cls, value: Any) -> Any:
        return without_private_text(value)

    @model_validator(mode="after")
    def _took_follows_from_the_lift(self) -> RunRecord:
        if self.took != took(self.metrics):
            lift = self.metric("lift")
            raise ValueError(f"took is {self.took} but the linear lift is {lift.value if lift else None}")
        return self

    def metric(self, name: str, probe: str = HEADLINE_PROBE) -> Metric | None:
        """One metric, or None where the run has not measured it."""
        return self.metrics.get(probe, {}).get(name)


Records: TypeAlias = list[RunRecord]  # `RunStore.list` hides the builtin inside its class


def took(metrics: Mapping[str, Mapping[str, Metric]]) -> bool:
    """Whether the attack took: the headline probe's lift is at least `TOOK_LIFT`."""
    lift = metrics.get(HEADLINE_PROBE, {}).get("lift")
    return lift is not None and lift.value is not None and lift.value >= TOOK_LIFT


def without_private_text(value: Any) -> Any:
    """`value` with home directories as `~` and this machine's name as `host`, in every string inside it."""
    if isinstance(value, Mapping):
        return {key: without_private_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_private_text(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    home, host = os.path.expanduser("~"), socket.gethostname()
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    if len(host) > 1 and host != "localhost":
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "host", text)
    return _HOMES.sub("~", text)


def load_record(path: Path) -> RunRecord:
    """Read a record from its `record.json`, or from the folder of its run.

    Raises:
        InputRefused: no such record, or its content is not what blto wrote.
        Mismatch: written by a newer blto.
    """
    file = path / "record.json" if path.is_dir() else path
    if not file.is_file():
        raise InputRefused(f"{show(file)}: no such record; give a run's folder or its record.json.")
    content = read_sealed(file, "record")
    try:
        return RunRecord.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputRefused(f"{show(file)}: {show(key)}: {show(problem['msg'])}; run the same spec again.") from error


class RunStore:
    """A directory of runs and of cached stages. Creating the object touches nothing on disk.

    Args:
        root: the directory; made when something is first stored.
        group: of processes that wait for each other's runs and stages; see `DirectoryLock`.
    """

    def __init__(self, root: Path, *, group: str = "") -> None:
        self.root = Path(root)
        self.group = group

    @staticmethod
    def run_id(spec: Mapping[str, Any]) -> str:
        """The name of a run: readable, and the same for the same resolved spec ("blto-cifar10-s0-1f0c9a2b7e")."""
        try:
            parts = [str(spec["attack"]["name"]), str(spec["data"]["name"]), f"s{int(spec['seed'])}"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"spec: needs attack.name, data.name and seed to name a run ({error}).") from error
        readable = "-".join(re.sub(r"[^A-Za-z0-9_]", "_", part) for part in parts)
        return f"{readable}-{sha256_bytes(canonical_json(dict(spec)))[:10]}"

    def folder(self, run_id: str) -> Path:
        """Where a run lives, whether or not it exists yet."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", run_id):
            raise ConfigError(f'"{show(run_id)}" is not a run id; run ids have letters, digits, "_", "-" and ".".')
        return self.root / run_id

    def lock(self, run_id: str) -> DirectoryLock:
        """The lock that a process holds while it works on a run."""
        return DirectoryLock(self.folder(run_id), group=self.group)

    def save(self, record: RunRecord) -> Path:
        """Store a record, which is what makes its run exist; returns the file."""
        file = self.folder(record.run_id) / "record.json"
        write_sealed(file, record.model_dump(mode="json"))
        return file

    def load(self, run: str | Path) -> RunRecord:
        """Read one record by run id, by its folder or by its file. Raises as `load_record` does."""
        by_id = self.root / str(run)
        return load_record(by_id if isinstance(run, str) and by_id.is_dir() else Path(run))

    def list(self) -> Records:
        """All whole records, by run id. A missing or damaged one is left out, as if its run had not happened.

        Raises:
            Mismatch: a record was written by a newer blto; leaving it out would make a table quietly incomplete.
        """
        records = []
        for file in sorted(self.root.glob("[!.]*/record.json")):
            try:
                records.append(load_record(file))
            except InputRefused:
                continue
        return records

    @staticmethod
    def stage_name(kind: str, inputs: Mapping[str, Any]) -> str:
        """The name of a stage's folder, which the records of runs give ("pretrain-1f0c9a2b7e63d541")."""
        return f"{kind}-{sha256_bytes(canonical_json({'results': RESULTS_VERSION, **inputs}))[:16]}"

    def stage(self, kind: str, inputs: Mapping[str, Any]) -> StageFolder:
        """The folder for one stage's result, made if need be, under the hash of what the result is made from."""
        make_directory(path := self.root / "stages" / self.stage_name(kind, inputs))
        return StageFolder(path, kind, dict(inputs), group=self.group)


class StageFolder:
    """The stored result of one stage: any files, and a `stage.json` written last that vouches for them.

    Args:
        path: the folder.
        kind: the stage ("craft", "pretrain").
        inputs: what the result is a function of.
        group: as in RunStore.
    """

    def __init__(self, path: Path, kind: str, inputs: Mapping[str, Any], *, group: str = "") -> None:
        self.path = path
        self.group = group
        self.kind = kind
        self.inputs = inputs

    @property
    def complete(self) -> bool:
        """Whether the stage was committed and every file still has the hash it had then."""
        try:
            files = self._stage()["files"]
            return all(sha256_file(safe_join(self.path, name)) == digest for name, digest in files.items())
        except InputRefused:
            return False

    @property
    def facts(self) -> dict[str, Any]:
        """What `commit` was given. Raises InputRefused where there is no whole `stage.json`."""
        return dict(self._stage()["facts"])

    @contextmanager
    def making(self, say: Callable[[str], None] | None = None) -> Iterator[bool]:
        """Hold the stage's lock while the block runs; yields whether there is anything to make, and locks only then.

        Raises:
            Busy: another process makes it, and is not of the same group; one that is, is waited for (and `say` told).
        """
        if self.complete:
            yield False
            return
        with DirectoryLock(self.path, group=self.group, say=say):
            yield not self.complete  # it may have been made while its lock was waited for

    def discard(self, name: str) -> None:
        """Remove a file that a finished stage no longer needs, such as its checkpoint."""
        remove_file(self.path / name)

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Declare the stage done: hash every file in the folder (hidden ones aside) and write `stage.json` last."""
        names = sorted(
            file.relative_to(self.path).as_posix()
            for file in self.path.rglob("*")
            if file.is_file() and file.name != "stage.json" and not file.name.startswith(".")
        )
        files = {name: sha256_file(self.path / name) for name in names}
        content = {"kind": self.kind, "inputs": dict(self.inputs), "facts": dict(facts), "files": files}
        write_sealed(self.path / "stage.json", {"schema_version": SCHEMA_VERSION, **content})

    def _stage(self) -> dict[str, Any]:
        return read_sealed(self.path / "stage.json", "stage")


def write_sealed(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with the checksum of its own content beside it."""
    write_json(file, {**content, "sha256": sha256_bytes(canonical_json(content))})


def read_sealed(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object written by `write_sealed`. The seal comes first: it means the same in every version."""
    name = show(file)
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(version := content.get("schema_version"), int):
        raise InputRefused(f"{name}: not a blto {what}; give a file that blto wrote.")
    seal = content.pop("sha256", None)
    if seal != sha256_bytes(canonical_json(content)):
        raise InputRefused(f"{name}: the {what} was altered or is damaged (checksum differs); run the same spec again.")
    if version > SCHEMA_VERSION:
        raise Mismatch(f"{name}: {what} of schema {version}, this blto reads up to {SCHEMA_VERSION}; upgrade blto.")
    return content
