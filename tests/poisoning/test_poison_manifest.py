"""The manifest says what was done, and a manifest that cannot be true is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blto.data.images import ImageSet
from blto.errors import BltoError, ConfigError
from blto.poisoning import (
    AdditiveTrigger,
    IdentityTrigger,
    Manifest,
    PoisonedDataset,
    PoisonPlan,
    build_manifest,
)
from blto.poisoning.manifest import parse_manifest


def test_manifest_says_what_was_done(dataset: PoisonedDataset, trigger: AdditiveTrigger) -> None:
    manifest = build_manifest(dataset, trigger, seeds={"select": 7})
    first = dataset.plan.indices[0]
    assert manifest.layout is None
    assert (manifest.n_images, manifest.n_poisoned, manifest.poison_rate) == (12, 2, 2 / 12)
    assert [poison.index for poison in manifest.poisons] == dataset.plan.indices.tolist()
    assert manifest.trigger_sha256 == trigger.identity
    assert manifest.seeds == {"select": 7}
    assert manifest.clean_sha256 == dataset.clean.content_hash
    assert manifest.poisoned_sha256 == dataset.poisoned.content_hash
    assert manifest.epsilon == 8 / 255
    assert manifest.epsilon_reached == dataset.epsilon_reached == 8 / 255
    for images, recorded in (
        (dataset.clean.images, manifest.poisons[0].source_sha256),
        (dataset.poisoned.images, manifest.poisons[0].poisoned_sha256),
    ):
        pixels = images[first].transpose(1, 2, 0).tobytes()
        assert recorded == sha256(b"(8, 8, 3)" + pixels).hexdigest()
    assert parse_manifest(json.loads(manifest.model_dump_json()), "x") == manifest


def test_labels_are_needed(dataset: PoisonedDataset, trigger: AdditiveTrigger) -> None:
    with pytest.raises(ConfigError, match="pass the labeled set"):
        build_manifest(replace(dataset, clean=dataset.clean.without_labels()), trigger, seeds={})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from(sorted(Manifest.model_fields)), json_values)
def test_any_value_in_any_field_is_accepted_or_refused_in_one_line(field: str, value: Any) -> None:
    clean = ImageSet(np.zeros((2, 3, 2, 2), dtype=np.uint8), np.zeros(2, dtype=np.int64), ("a",), "toy")
    none = PoisonedDataset(clean, PoisonPlan(np.array([], dtype=np.int64), 0, 2), clean.images[:0])
    content = {**build_manifest(none, IdentityTrigger(), seeds={}).model_dump(), field: value}
    message = "m.json: accepted"
    try:
        parse_manifest(content, "m.json")
    except BltoError as error:
        message = str(error)
    assert message.startswith("m.json: ")
    assert message.isprintable()
