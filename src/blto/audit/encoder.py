"""The scan of an encoder: read it, let detectors look, compare with clean encoders, say how sure that is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from blto.audit.looking import Looking
from blto.audit.reading import read_clean, read_suspect, require_features
from blto.audit.verdict import Judgement, Outcome, Verdict, judge
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, EncoderDetector, Inspection
from blto.errors import ConfigError, InputRefused
from blto.files import sha256_file, show
from blto.files.foreign.pickles import CodeFoundError
from blto.models.encoder import Encoder
from blto.records import RunStore
from blto.runtime.progress import SILENT, Progress

LARGE = 128
"""Pixels a side from which on DECREE gets its authors' settings for 224 pixels."""
BOUND = 0.9
"""Cosine to the reference from which on a drill's backdoor counts as one."""
NOT_TESTED = (
    "Triggers that change the whole image by little (CTRL, BLTO): of the detectors here only generator inversion has "
    "been seen to answer to one of them, BLTO's, and not reliably.",
    "Backdoors that answer to something else than images, or to several triggers together.",
    "Whether the training images were poisoned: that is a question to the data.",
)


@dataclass(frozen=True, eq=False)
class EncoderScan:
    """A scan's result.

    Attributes:
        file, sha256, format, notes: of the suspect.
        judgement: verdict, p-value, reasons, power.
        outcomes: what each detector found.
        inspections: the same with the reconstructed trigger, in the order of the outcomes.
        images: how many images there were, and of which set.
        tested, not_tested: what this scan can and cannot speak of, as sentences.
        alpha: the error rate asked for.
        seconds: of wall time.
    """

    file: str
    sha256: str
    format: str
    notes: tuple[str, ...]
    judgement: Judgement
    outcomes: tuple[Outcome, ...]
    inspections: tuple[Inspection, ...]
    images: str
    tested: tuple[str, ...]
    not_tested: tuple[str, ...]
    alpha: float
    seconds: float


def scan_encoder(
    path: Path,
    images: ImageSet,
    *,
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    clean: Sequence[Path] = (),
    detectors: Sequence[Mapping[str, Any]] | None = None,
    drill: int = 0,
    alpha: float = 0.05,
    seed: int = 0,
    store: RunStore,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> EncoderScan:
    """Scan one encoder.

    Args:
        path: the suspect's file.
        images: clean images of the kind that the encoder was made for, on which it was not trained.
        arch, options: of a file that blto did not write; see `models.foreign.import_encoder`.
        clean: encoders of the same family that are known to be clean: another seed of the same recipe. One that is
            given twice counts once, and the suspect itself not at all. Without any, or with too few, the verdict is
            "inconclusive". A detector that learns from clean encoders takes the first of them, and the suspect is
            compared with the others.
        detectors: entries of DEFENSES that inspect encoders, with their options; None is `usual_detectors`. One that
            cannot inspect such an encoder is left out, which the result says.
        drill: how many of the clean encoders blto tampers with (BadEncoder) and scans as well, to measure the power.
        alpha: the share of clean encoders that may be called suspect.
        seed: of all that is drawn.
        store: keeps each inspection, so that a clean encoder is looked at once.
        device, progress: where to compute, and where progress goes.

    Raises:
        ConfigError: an option out of range, a detector that is none, or a clean encoder of another family.
        InputRefused: a file that is not an encoder, or too few images. One that holds code or weights that are no
            numbers is a finding and not an error.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha:g}; give a share between 0 and 1.")
    if drill < 0:
        raise ConfigError(f"--drill is {drill}; give 0 or more.")
    built = [_detector(spec) for spec in (usual_detectors(images.image_size) if detectors is None else detectors)]
    started = time.monotonic()
    shown_images = f"{len(images)} images of {images.name}"
    try:
        suspect = read_suspect(path, arch, options or {})
        require_features(suspect, images)
    except InputRefused as error:
        if error.code != "CKPT-NAN" and not isinstance(error.__cause__, CodeFoundError):
            raise
        return EncoderScan(
            file=show(path.name),
            sha256=sha256_file(path),
            format="refused",
            notes=(),
            judgement=Judgement(Verdict.SUSPECT, None, (str(error),)),
            outcomes=(),
            inspections=(),
            images=shown_images,
            tested=("The file itself: it was read without running anything in it.",),
            not_tested=("Everything else: the encoder was not loaded.",),
            alpha=alpha,
            seconds=time.monotonic() - started,
        )
    known = read_clean(clean, suspect, arch, options or {})
    reasons = [(spec, detector, _reason_against(detector, suspect.encoder, len(known))) for spec, detector in built]
    fitting = [(spec, detector) for spec, detector, reason in reasons if reason is None]
    left_out = [f"{DEFENSES.card(spec['name']).title}: {reason}." for spec, _, reason in reasons if reason]
    if not fitting:
        raise ConfigError(f"--detector: none of them can inspect {suspect.name}; {' '.join(left_out)}")
    free = len(known) - max(detector.references for _, detector in fitting)
    if drill > free:
        raise ConfigError(
            f"--drill is {drill}, with {free} clean encoders that no detector learns from; give 0 to that many."
        )
    looking = Looking(images, store, Conditions(seed, device, progress))
    drilled = [looking.plant(each) for each in known[len(known) - drill :]]
    planted = [each for each, cosine in drilled if cosine >= BOUND]
    doubtful = [(spec, each.evidence) for spec, each in fitting if each.evidence.status != "verified"]
    notes = [f"{DEFENSES.card(spec['name']).title} is experimental: {evidence.said}" for spec, evidence in doubtful]
    notes += suspect.notes
    if len(known) < len(clean):
        notes.append(f"{len(clean) - len(known)} of the clean files were the suspect itself or another of them again.")
    if len(planted) < len(drilled):
        notes.append(
            f"{len(drilled) - len(planted)} of the drill's {len(drilled)} backdoors did not bind; they do not count."
        )
    outcomes, inspections = [], []
    for spec, detector in fitting:
        references, others = known[: detector.references], known[detector.references :]
        found = looking.inspect(spec, detector, suspect, references)
        inspections.append(found)
        outcomes.append(
            Outcome(
                detector=spec["name"],
                title=DEFENSES.card(spec["name"]).title,
                score=found.score,
                flagged=found.flagged,
                measures=found.measures,
                clean=tuple(looking.inspect(spec, detector, each, references).score for each in others),
                planted=tuple(looking.inspect(spec, detector, each, references).score for each in planted),
                seconds=found.seconds,
                references=len(references),
            )
        )
    return EncoderScan(
        file=suspect.name,
        sha256=suspect.sha256,
        format=suspect.format,
        notes=tuple(notes),
        judgement=judge(outcomes, alpha=alpha),
        outcomes=tuple(outcomes),
        inspections=tuple(inspections),
        images=shown_images,
        tested=tuple(f"{each.title}: {DEFENSES.card(each.detector).summary}." for each in outcomes),
        not_tested=(*left_out, *NOT_TESTED),
        alpha=alpha,
        seconds=time.monotonic() - started,
    )


def usual_detectors(image_size: int) -> list[dict[str, Any]]:
    """The detectors of a scan that names none, for images of so many pixels a side."""
    large = {"least_lambda": 1e-7, "patience": 35} if image_size >= LARGE else {}
    windows = {"starts": 9, "begin": "windows", "epochs": 100}
    return [{"name": "decree", **windows, **large}, {"name": "channel_outlier"}]


def _reason_against(detector: EncoderDetector, encoder: Encoder, clean: int) -> str | None:
    """Why a detector cannot inspect such an encoder beside so many clean ones, as a clause; None where it can."""
    if clean < detector.references:
        return f"it learns from {detector.references} clean encoders of the family, and there are {clean}"
    return detector.reason_against(encoder)


def _detector(spec: Mapping[str, Any]) -> tuple[dict[str, Any], EncoderDetector]:
    """The resolved spec of a detector, and it. Raises ConfigError for a defense that does not inspect encoders."""
    resolved = DEFENSES.resolve(spec, "--detector")
    built = DEFENSES.build(resolved)
    if not isinstance(built, EncoderDetector):
        raise ConfigError(f"--detector {resolved['name']}: it does not inspect encoders; {_detectors()}.")
    return resolved, built


def _detectors() -> str:
    names = [name for name in DEFENSES.names() if issubclass(cast(type, DEFENSES.get(name)), EncoderDetector)]
    return f"those that do: {', '.join(names)}"
