"""The fields of the trigger forms that several DAGs have."""

from pathlib import Path

from airflow.sdk import Param

from dags.cifar10_shared import TRAINERS

RECIPES_DIR = Path(__file__).parent.parent / "recipes"
# By architecture: recipes/sweeps has searches, which cannot be trained by.
RECIPES = sorted({path.stem for name in TRAINERS for path in (RECIPES_DIR / name).glob("*.toml")})

RECIPE = Param(
    None,
    type=["null", "string"],
    enum=[None, *RECIPES],
    title="Recipe",
    description="How to train (of recipes/). Empty: what the triggering run asked for, else `report`.",
)
DATASET_ID = Param(
    None, type=["null", "string"], title="Dataset id", description="Empty: the triggering run's, else the newest."
)
TEST_LIMIT = Param(
    None, type=["null", "integer"], minimum=100, title="Test images", description="Judge on so many; empty: on all."
)
NEW_LINEAGE = Param(
    None,
    type=["null", "boolean"],
    title="New lineage",
    description="Let a model of this dataset replace a champion that was trained on another one.",
)
AFTER_SHADOW = Param(
    None,
    type=["null", "integer"],
    minimum=1,
    title="After shadow",
    description="Move the alias only after so many live images were mirrored to the winner. Empty: at once.",
)

WEIGHTS = Param(
    None,
    type=["null", "string"],
    title="VGG16's weights",
    description="imagenet, a notop file, random or auto. Empty: VGG16_WEIGHTS.",
)
ALLOW_STAND_IN = Param(
    None,
    type=["null", "boolean"],
    title="Allow a stand-in",
    description="For a demo: where nothing can be downloaded, generated images and random weights, labelled as such.",
)
SOURCE = Param(
    None,
    type=["null", "string"],
    title="Source",
    description="auto, synthetic, a URL, or a path of the tar.gz or its folder. Empty: CIFAR10_SOURCE.",
)
RETRAINING_ID = Param(
    None, type=["null", "integer"], title="Retraining", description="The monitor sets it; leave it empty."
)

PROMOTION = {
    "dataset_id": DATASET_ID,
    "test_limit": TEST_LIMIT,
    "new_lineage": NEW_LINEAGE,
    "after_shadow": AFTER_SHADOW,
}
"""What a promotion is asked for: by the form, or by what triggers it."""
