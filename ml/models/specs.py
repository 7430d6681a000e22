"""What a model is made of, as plain frozen values; owns the names of architectures and layers.

Building is the catalog's. Nothing here imports TensorFlow, so that reading a recipe costs milliseconds.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Architecture = Literal["baseline", "vgg16"]
ARCHITECTURES: tuple[Architecture, ...] = ("baseline", "vgg16")

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BaselineSpec(BaseModel):
    """The CNN trained from nothing. Each block is its convolutions, a max pooling and a dropout."""

    model_config = _STRICT

    # TOML and JSON know lists, not tuples: the sequence is lenient, its numbers are not.
    filters: tuple[Annotated[int, Field(ge=1, strict=True)], ...] = Field(
        default=(32, 64, 128), min_length=1, max_length=5, strict=False
    )
    """Filters of each block. Every block halves the side, so five is the most that 32 pixels allow."""
    convolutions_per_block: int = Field(default=1, ge=1, le=4)
    block_dropout: float = Field(default=0.2, ge=0, lt=1)
    dense_units: int = Field(default=128, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    batch_norm_momentum: float = Field(default=0.99, ge=0, lt=1)
    """Share of the old moving statistics that a step keeps. Short trainings need less than Keras' 0.99."""

    @property
    def learning_layers(self) -> tuple[str, ...]:
        """Names of the layers with weights, from the image on: what a stage may unfreeze from."""
        blocks = range(1, len(self.filters) + 1)
        convolutions = range(1, self.convolutions_per_block + 1)
        body = [f"block{b}_{kind}{c}" for b in blocks for c in convolutions for kind in ("conv", "norm")]
        return (*body, "dense", "probabilities")


VGG16_CONVOLUTIONS: tuple[str, ...] = tuple(
    f"block{block}_conv{i}" for block, count in enumerate((2, 2, 3, 3, 3), start=1) for i in range(1, count + 1)
)
"""The thirteen convolutions of the paper's configuration D, as Keras names them."""


class Vgg16BaseSpec(BaseModel):
    """VGG16's convolutional base with batch normalisation, for training it from nothing, and a softmax on top."""

    model_config = _STRICT

    batch_norm_momentum: float = Field(default=0.9, ge=0, lt=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before the softmax."""

    @property
    def learning_layers(self) -> tuple[str, ...]:
        """As `BaselineSpec.learning_layers`."""
        return (*(name for conv in VGG16_CONVOLUTIONS for name in (conv, norm_of(conv))), "probabilities")


def norm_of(convolution: str) -> str:
    """Name of the batch normalisation behind a convolution."""
    return convolution.replace("conv", "norm")


class Vgg16Spec(BaseModel):
    """The new dense layers on VGG16's convolutional base; the base itself is fixed by the paper."""

    model_config = _STRICT

    input_size: int = Field(default=32, ge=32, le=224, multiple_of=32)
    """Side in pixels that the base sees; images are enlarged to it inside the model (bilinear)."""
    dense_units: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)

    @property
    def learning_layers(self) -> tuple[str, ...]:
        """As `BaselineSpec.learning_layers`."""
        return (*VGG16_CONVOLUTIONS, "dense", "probabilities")
