"""The check of a trigger before any victim is trained, `blto craft --check`:

    trigger -> held-out images -> its surrogate, and clean encoders that it never met -> gates -> a JSON file beside it

A victim costs a whole pretraining. A trigger that fails on the surrogate, where it was learned, is not worth one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blto.data.images import ImageSet
from blto.data.views import Views
from blto.errors import ConfigError
from blto.evaluation import PROBES
from blto.evaluation.doctor import ENOUGH, UNEDITED, Reaction, reach, react, works
from blto.experiment import Data, Environment, ExperimentSpec, build_attack, pretrain_stage
from blto.experiment.outcome import ENCODER
from blto.files import sha256_file, show, write_json
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder
from blto.poisoning import Budget, apply_to_uint8, load_trigger
from blto.pretraining.spec import PretrainingSpec
from blto.records import without_private_text
from blto.report.wording import percent, with_interval
from blto.runtime.seeds import numpy_generator

Rows = npt.NDArray[np.int64]
BANK = 10_000
"""Images that a probe is fitted on, at most: a check is to be quick."""
REFERENCES = 512
"""Images of the target class that its place is taken from, at most."""
UNSEEN_SEED = 1
"""Added to the run's seed for encoders that the check trains: the clean twin of a run with that seed is such a one."""


def prepared(files: Iterable[str | os.PathLike[str]], count: int) -> dict[str, Encoder]:
    """The clean encoders of these files, by name and hash; what is wrong with them or with `count` shows first.

    The same encoder given twice counts once.

    Raises:
        ConfigError: a count below 1.
        InputRefused: a file that is no encoder.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; give the number of images to measure on, at least 1.")
    loaded = [(path, load_encoder(path)) for path in map(Path, files)]
    return {f"{show(path.name)} ({sha256_file(path)[:12]})": encoder for path, encoder in loaded}


class Split(NamedTuple):
    """Rows of the training images: those measured, those that probes are fitted on, those of the target class."""

    measured: Rows
    bank: Rows
    references: Rows


def split(labels: Rows, count: int, target_class: int, seed: int) -> Split:
    """Hold out `count` images, as many of each class as is its share, at least one and else at most half of it.

    The bank is drawn from the others, and so are the references, which may be in the bank as well.

    Raises:
        ConfigError: fewer than two images of the target class.
    """
    order = numpy_generator(seed, "select", "check").permutation(len(labels))
    share = min(0.5, count / len(labels))
    is_measured = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        is_measured[of_class[: max(1, int(share * len(of_class)))]] = True
    others = order[~is_measured[order]]
    references = others[labels[others] == target_class][:REFERENCES]
    if not len(references):
        raise ConfigError(f"attack.target_class: class {target_class} has fewer than 2 training images; take another.")
    return Split(np.flatnonzero(is_measured), others[:BANK], references)


def surrogate_recipe(spec: ExperimentSpec, images: ImageSet) -> PretrainingSpec:
    """The recipe of the attack's surrogate, for about as many epochs as one trains; without one, the victim's."""
    bilevel = spec.attack.get("bilevel")
    if not bilevel:
        return spec.recipe
    rounds = min(bilevel["rounds"], bilevel["reinitialise_every"])  # of one surrogate
    steps = bilevel["warm_start_steps"] + rounds * bilevel["inner_steps"]
    batch_size = min(bilevel["surrogate"]["batch_size"], len(images))
    epochs = max(1, round(steps * batch_size / len(images)))
    return PretrainingSpec.model_validate({**bilevel["surrogate"], "batch_size": batch_size, "epochs": epochs})


def clean_encoder(
    spec: ExperimentSpec, images: ImageSet, environment: Environment, recipe: PretrainingSpec, title: str
) -> Encoder:
    """An encoder of the images as they are, of a seed that the run does not have: trained, or found in the store."""
    changes = {"pretraining": recipe, "recipe_change": None, "seed": spec.seed + UNSEEN_SEED}
    other = spec.model_copy(update=changes)
    stage = pretrain_stage(other, images.without_labels(), environment, title=title)
    return load_encoder(stage.path / ENCODER)


def encoders_to_ask(
    spec: ExperimentSpec, data: Data, environment: Environment, surrogate: Path, given: Mapping[str, Encoder]
) -> dict[str, tuple[str, Encoder]]:
    """Name -> where it comes from, and the encoder: "surrogate" first, then those that never met the trigger."""
    seed = spec.seed + UNSEEN_SEED
    if surrogate.exists():
        found = {"surrogate": ("the last surrogate of the trigger's own training", load_encoder(surrogate))}
    else:
        recipe = surrogate_recipe(spec, data.attacker)
        like = clean_encoder(spec, data.attacker, environment, recipe, "pretrain a stand-in surrogate")
        whose = "none was kept: its" if spec.attack.get("bilevel") else "the attack has none: the victim's"
        found = {"surrogate": (f"a stand-in, since {whose} recipe, on clean images, seed {seed}", like)}
    for number, (name, encoder) in enumerate(given.items(), 1):
        found[f"unseen {number}"] = (name, encoder)
    if not given:
        unseen = clean_encoder(spec, data.train, environment, spec.recipe, "pretrain an unseen clean encoder")
        found["unseen 1"] = (f"the victim's recipe, on clean images, seed {seed}", unseen)
    return found


def check_file(trigger: Path) -> Path:
    """Where the findings about a trigger file are written: beside it."""
    return trigger.with_name(f"{trigger.stem}.check.json")


def examine(
    spec: ExperimentSpec,
    data: Data,
    file: Path,
    environment: Environment,
    *,
    surrogate: Path,
    encoders: Mapping[str, Encoder],
    count: int,
) -> dict[str, Any]:
    """Measure a trigger, judge it, and write what was found beside it; returns the same.

    Args:
        spec, data, environment: as everywhere; the victim's views, its recipe, the budget and the target class count.
        file: the trigger.
        surrogate: where its surrogate's encoder is, if it was kept; else a clean stand-in is trained.
        encoders: clean encoders by name; without any, one is trained by the victim's recipe.
        count: images to measure on, at most half of the training images.

    Raises:
        ConfigError: data without labels, or too few images.
        InputRefused: the trigger's or the surrogate's file.
    """
    attack, train = build_attack(spec, data), data.train
    assert train.labels is not None  # `build_attack` refuses sets without labels
    rows = split(train.labels, count, attack.target_class, spec.seed)
    measured, bank, trigger = train.subset(rows.measured), train.subset(rows.bank), load_trigger(file)
    triggered = apply_to_uint8(trigger.at_test(), measured.images)
    findings: list[dict[str, Any]] = []
    reactions: dict[str, dict[str, Reaction]] = {}
    for name, (origin, encoder) in encoders_to_ask(spec, data, environment, surrogate, encoders).items():
        environment.progress.say(f"check on {name}: {origin}")
        reactions[name] = react(
            encoder.to(environment.device),
            bank=bank,
            references=train.images[rows.references],
            measured=measured,
            triggered=triggered,
            target_class=attack.target_class,
            views=Views(spec.recipe.views, train.image_size),
            probes={probe: spec.probes.get(probe, {}) for probe in PROBES},
        )
        edits = [{"name": edit, **_plain(reaction)} for edit, reaction in reactions[name].items()]
        findings.append({"name": name, "origin": origin, "edits": edits})
    reached = reach(measured.images, triggered)
    levels = Budget(spec.attack["epsilon"]).levels if "epsilon" in spec.attack else trigger.budget.levels
    found = {
        "schema_version": 1,
        "trigger_sha256": trigger.identity,
        "seed": spec.seed,
        "attack": spec.attack,
        "images": {
            "what": f"{len(measured)} training images of {train.name}, held out from the probes (fitted on "
            f"{len(bank)} others), not from encoders and trigger, which may have been trained on them",
            "count": len(measured),
            "rows": rows.measured.tolist(),
            "train_sha256": train.content_hash,
        },
        "reach": {**reached, "levels": levels},
        "encoders": findings,
        "gates": gates({name: each[UNEDITED] for name, each in reactions.items()}, reached, levels),
    }
    shareable: dict[str, Any] = without_private_text(found)
    write_json(check_file(file), shareable)
    return shareable


def gates(reactions: Mapping[str, Reaction], reached: Mapping[str, float], levels: int) -> dict[str, dict[str, Any]]:
    """The verdicts: by gate, `passes` (None where there is no threshold) and `finding`, in words.

    Args:
        reactions: to unedited images; "surrogate" and the unseen encoders.
        reached: as `reach` says.
        levels: the budget, of 255.
    """
    asr = {name: reaction.metrics[PROBES[0]]["asr"] for name, reaction in reactions.items()}
    near = reactions["surrogate"].similarity
    unseen = ", ".join(f"{with_interval(asr[name])} on {name}" for name in asr if name != "surrogate")
    return {
        "gate 2 (surrogate)": {
            "passes": works(reactions["surrogate"]),
            "finding": f"ASR {with_interval(asr['surrogate'])}, {percent(ENOUGH, 0)} is enough; similarity "
            f"{near['triggered']:.2f}, that of the target's own images {near['target']:.2f}",
        },
        "gate 3 (transfer)": {"passes": None, "finding": f"ASR without any poison: {unseen}"},
        "the budget": {
            "passes": reached["max"] <= levels,
            "finding": f"largest change {reached['max']:g} of 255, mean {reached['mean']:.2f}; {levels} are allowed",
        },
    }


def _plain(reaction: Reaction) -> dict[str, Any]:
    metrics = {
        probe: {name: metric.model_dump() for name, metric in each.items()} for probe, each in reaction.metrics.items()
    }
    return {"similarity": reaction.similarity, "metrics": metrics}
