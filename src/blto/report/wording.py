"""How numbers are said in words: percent and points only here, fractions everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blto.records import TOOK_LIFT, Metric, RunRecord

MISSING = "\N{EN DASH}"
CONTROLS = frozenset({"clean", "untrained_generator", "universal_delta", "frozen_surrogate"})

MEANING = (
    f"An attack took if poisoning adds at least {TOOK_LIFT * 100:.0f} points to the share of triggered images that "
    "land in the target class, beyond what the trigger does to a clean encoder and the encoder does to clean images."
)

DEFINITIONS: dict[str, str] = {
    "Attack success rate (ASR)": "Share of triggered test images that the probe assigns to the target class. Images "
    "that belong to the target class are left out: for them a hit says nothing.",
    "ASR of the clean twin": "The same triggered images, on an encoder trained with the same seeds and data but no "
    "poison. It is what the trigger does by itself, as an adversarial perturbation of any encoder.",
    "Untriggered rate": "Share of test images of other classes that the poisoned encoder's probe assigns to the "
    "target class although they carry no trigger.",
    "Lift": "ASR minus the larger of the untriggered rate and the clean twin's ASR: the part that poisoning adds.",
    "Took": f"The lift of the linear probe is at least {TOOK_LIFT * 100:.0f} points.",
    "Control": "An attack that lacks what makes BLTO work: clean, untrained generator, universal delta, frozen "
    "surrogate. It shows how much a weaker cause does by itself.",
    "Clean accuracy": "Share of all test images, without trigger, that the poisoned encoder's probe assigns to "
    "their class.",
    "Backdoor accuracy": "Share of triggered images that are still assigned to their own class.",
    "ASR, all images": "As ASR, with the images of the target class counted. Other papers report it; it flatters.",
    "Interval": "95% over the test images of this one run. It says nothing about other seeds: to compare attacks, "
    "use several runs of each. In a row that is a mean of several seeds it is Student's t over those seeds.",
    "n": "Number of test images behind a value; in the tables of all runs, the n of the ASR, or the number of seeds "
    "behind a mean.",
    "Poison rate": "Poisoned images divided by all training images after poisoning.",
    "Epsilon": "The budget: how far the trigger may move a channel of a pixel, of the range from 0 to 1. Where an "
    'attack has none: "none" and how far its poisons and its test images did move, once where that is the same.',
    "Probe": "Classifier on frozen features: linear is multinomial logistic regression, knn a weighted vote of the "
    "nearest training images.",
    "Similarity": "Cosine between an image's features and the centroid of the target class. Raw: of the features as "
    "they are, all of which resemble each other; centred: after the mean feature of clean images is subtracted; "
    "normalised: 0 is the raw level of untriggered images of other classes, 1 that of the target class.",
    "Alignment": "Mean squared distance between the unit features of two views of one image; lower is more invariant.",
    "Uniformity": "Logarithm of the mean Gaussian potential between unit features of different images; lower is "
    "more spread out.",
    "L-inf": "Largest change of any pixel channel, over all triggered test images, of 255.",
    "L2": "Euclidean norm of an image's change, pixels from 0 to 1; the mean over images.",
    "PSNR": "Peak signal-to-noise ratio of triggered against original images in decibels; higher is harder to see.",
    "SSIM": "Structural similarity of triggered and original images; 1 is identical.",
}


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as percent: 0.931 is "93.1%"; None is a dash."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, with its sign: 0.85 is "+85.0 points"."""
    return MISSING if value is None else f"{100 * value:+.1f} points"


def interval(metric: Metric | None) -> str:
    """The interval in percent: "[92.4, 93.7]"; empty where there is none."""
    if metric is None or metric.low is None or metric.high is None:
        return ""
    return f"[{100 * metric.low:.1f}, {100 * metric.high:.1f}]"


def with_interval(metric: Metric | None) -> str:
    """Value and interval: "93.1% [92.4, 93.7]"; a dash where nothing was measured."""
    value = percent(metric.value if metric else None)
    return f"{value} {interval(metric)}".rstrip()


def lookup(spec: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path, or None: `lookup(spec, "pretraining.method.name")`."""
    value: Any = spec
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_attack(record: RunRecord) -> bool:
    """Whether anything was poisoned at all: the `clean` attack is the control."""
    return bool(lookup(record.spec, "attack.name") != "clean")


def is_control(record: RunRecord) -> bool:
    """Whether the run is there for others to be compared with."""
    return lookup(record.spec, "attack.name") in CONTROLS


def verdict(record: RunRecord) -> tuple[str, str]:
    """(short answer, one sentence with the numbers): did the attack take?"""
    metrics = [record.metric(name) for name in ("lift", "asr", "asr_clean_twin", "untriggered_rate")]
    if any(metric is None or metric.value is None for metric in metrics):
        return "Not measured.", "This run lacks a metric of the linear probe, so whether the attack took is not known."
    lift, asr, twin, untriggered = metrics
    numbers = (
        f"The trigger sends {with_interval(asr)} of the images of other classes to the target class, against "
        f"{with_interval(twin)} on the clean twin and {with_interval(untriggered)} without the trigger: "
        f"a lift of {points(lift.value if lift else None)} {interval(lift)}".rstrip()
        + "."
    )
    if not is_attack(record):
        return "Clean run.", f"Nothing was poisoned. {numbers}"
    what = "control" if is_control(record) else "attack"
    if record.took:
        return f"The {what} took.", numbers
    return f"The {what} did not take.", f"{numbers} At least {TOOK_LIFT * 100:.0f} points count as taken."


def overall(records: Sequence[RunRecord]) -> str:
    """One line for all runs of a report, its controls counted apart."""
    attacks = [record for record in records if not is_control(record)]
    controls = [record for record in records if is_control(record) and is_attack(record)]
    if len(records) == 1 or (len(attacks) == 1 and not controls):
        return verdict((attacks or controls or records)[0])[0]
    words = []
    if len(attacks) == 1:
        words.append(verdict(attacks[0])[0])
    elif attacks:
        words.append(f"{sum(record.took for record in attacks)} of {len(attacks)} attacks took.")
    if controls:
        number = f"{len(controls)} control{'s' * (len(controls) > 1)}"
        words.append(f"{sum(record.took for record in controls)} of {number} took.")
    return " ".join(words) or "Clean runs only."


def comparison(found: Mapping[str, Any]) -> str:
    """A sweep's declared comparison, as its `comparison.json` has it, in one sentence."""
    what = f"{found['metric']} of {found['first']} minus that of {found['second']} ({found['probe']} probe)"
    n = len(found["seeds"])
    if found["mean"] is None:
        failed = f", of which {len(found['failed'])} failed" if found["failed"] else ""
        return f"{what}: waits for {len(found['waiting'])} of {n} paired seeds{failed}; it is read once, at the end."
    mean = Metric(**found["mean"])
    difference = f"{points(mean.value)} {interval(mean)}".rstrip()
    verdict = "established" if found["established"] else "not established"
    claim = f"that {found['first']} is higher is {verdict}"
    return f"{what}: {difference} over {n} paired seeds, sign-flip test p = {found['p']:.3f}; {claim}."
