"""What a run is a function of, as a frozen, validated object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from blto.attacks import ATTACKS
from blto.data import DATASETS
from blto.defenses import DEFENSES
from blto.defenses.base import RecipeChange
from blto.errors import BltoError, ConfigError
from blto.evaluation import check_probe
from blto.files import show
from blto.pretraining.spec import Engine, PretrainingSpec, component
from blto.records import RunStore
from blto.registry import later_option, validate


def _known_probes(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, each probe and option known."""
    try:
        for name, options in given.items():
            check_probe(name, f"probes.{name}", **options)
    except BltoError as error:
        raise ValueError(str(error).rstrip(".")) from error
    return given


def change_recipe(recipe: PretrainingSpec, defense: Mapping[str, Any]) -> PretrainingSpec:
    """The recipe as a defense changes it. Raises ConfigError for a defense that changes none, or not this one."""
    built = DEFENSES.build(defense)
    if not isinstance(built, RecipeChange):
        known = [name for name in DEFENSES.names() if issubclass(DEFENSES.get(name), RecipeChange)]  # type: ignore[arg-type]  # a class
        raise ConfigError(f"{defense['name']} does not change a recipe; give one of {', '.join(known)}.")
    return built.change(recipe)


class ExperimentSpec(BaseModel):
    """What a run is a function of.

    Attributes:
        seed: of every choice; victim and clean twin share it.
        data: name and arguments of an entry of DATASETS.
        attack: name and arguments of an entry of ATTACKS.
        pretraining: the victim's recipe.
        recipe_change: a defense that changes it, for the victim and its clean twin alike; the attacker, who does not
            know of it, keeps the surrogate's.
        attacker_share: 0 (the paper's setting): the attacker learns the trigger on the victim's own training images.
            Above 0: on this share of the training images, of every class, which the victim then never sees.
        held_out: 0 evaluates on the test set; above 0 so many training images, the same for every seed, take its place
            and nobody trains on them: for choosing recipes, so that the test set is read once.
        probes: probe name -> options; "linear" is the headline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: component(DATASETS)  # type: ignore[valid-type]  # made from the registry
    attack: component(ATTACKS)  # type: ignore[valid-type]  # made from the registry
    pretraining: PretrainingSpec = PretrainingSpec()
    recipe_change: Annotated[dict[str, Any] | None, later_option(None)] = None
    attacker_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    held_out: Annotated[int, Field(ge=0)] = 0
    probes: Annotated[dict[str, dict[str, Any]], AfterValidator(_known_probes)] = {"linear": {}, "knn": {}}

    @field_validator("recipe_change", mode="before")
    @classmethod
    def _can_change_the_recipe(cls, given: Any, info: ValidationInfo) -> dict[str, Any] | None:
        if given is None:
            return None
        try:
            defense = DEFENSES.resolve(given)
            if "pretraining" in info.data:  # else it is itself wrong
                change_recipe(info.data["pretraining"], defense)
        except BltoError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return defense

    @property
    def recipe(self) -> PretrainingSpec:
        """By which victim and clean twin are trained: `pretraining`, as `recipe_change` makes it."""
        return self.pretraining if self.recipe_change is None else change_recipe(self.pretraining, self.recipe_change)

    @classmethod
    def parse(cls, given: dict[str, Any]) -> ExperimentSpec:
        """Validate plain data. Raises ConfigError with the key."""
        return validate(cls, given, "")

    @property
    def run_id(self) -> str:
        """The name of the run's folder."""
        return RunStore.run_id(self.model_dump(mode="json"))

    def with_control(self, control: str | Mapping[str, Any], where: str = "controls") -> ExperimentSpec:
        """The same experiment with another attack, which takes over the target class, rate, budget and other options
        that it shares with this one's, except those that `control` gives itself. Raises ConfigError with the key under
        `where`.
        """
        if not isinstance(control, str | Mapping):
            raise ConfigError(f"{where}: {show(control)} is neither an attack's name nor a mapping with a name.")
        own = {"name": control} if isinstance(control, str) else dict(control)
        known = ATTACKS.schema(own["name"]).model_fields if own.get("name") in ATTACKS.names() else {}
        shared = {key: value for key, value in self.attack.items() if key in known}
        return self.parse({**self.model_dump(mode="json"), "attack": ATTACKS.resolve({**shared, **own}, where)})

    def with_engine(self, engine: Engine) -> ExperimentSpec:
        """The same experiment with victim, twin and the trigger's surrogate, where there is one, on `engine`. Raises
        ConfigError for another word than "fast" or "reference".
        """
        given = self.model_dump(mode="json")
        given["pretraining"]["engine"] = engine
        if bilevel := given["attack"].get("bilevel"):
            bilevel["surrogate"]["engine"] = engine
        return self.parse(given)
