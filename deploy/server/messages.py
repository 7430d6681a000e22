"""What goes over the wire, as types: mypy holds the code that builds a reply to them, and the interface's document is
made of them. They cost nothing while a request runs. None of them holds other fields than it names.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 - pydantic asks for these on 3.11

from deploy.server.bodies import FIELD
from ml.datasets.labels import CLASS_NAMES, NUM_CLASSES
from ml.serving.decoding import MAX_IMAGES

Uuid = Annotated[str, WithJsonSchema({"type": "string", "format": "uuid"})]
Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
Uri = Annotated[str, WithJsonSchema({"type": "string", "format": "uri"})]
Probability = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, WithJsonSchema({"type": "string", "enum": list(CLASS_NAMES)})]
Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
Count = Annotated[int, Field(ge=0)]
Version = Annotated[int, Field(ge=1)]
File = Annotated[bytes, WithJsonSchema({"type": "string", "contentMediaType": "image/*"})]

_PROBABILITY: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
Probabilities = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "required": list(CLASS_NAMES),
            "properties": dict.fromkeys(CLASS_NAMES, _PROBABILITY),
            "additionalProperties": False,
        }
    ),
]
_Channel = Annotated[float, Field(ge=0, le=255)]
_Pixel = Annotated[list[_Channel], Field(min_length=3, max_length=3)]
Pixels = Annotated[
    list[Annotated[list[_Pixel], Field(min_length=1)]],
    Field(min_length=1, description="height x width x 3, RGB, 0-255; resized to 32x32"),
]


class Model(TypedDict):
    """How a reply names the model that answered."""

    name: Annotated[str, Field(examples=["cifar10-classifier"])]
    version: Version
    alias: Annotated[
        str,
        Field(
            description="challenger where it is on trial, and this request was one of its share", examples=["champion"]
        ),
    ]
    data: Annotated[str, Field(description="what it learnt from: cifar-10, or SYNTHETIC", examples=["cifar-10"])]
    weights: NotRequired[Annotated[Literal["RANDOM WEIGHTS"], Field(description="stands only where it is so")]]


class Prediction(TypedDict):
    """One image's answer."""

    label: Label
    class_id: Annotated[int, Field(ge=0, le=NUM_CLASSES - 1)]
    probability: Probability
    probabilities: Probabilities
    image: NotRequired[
        Annotated[
            Base64,
            Field(
                description="with ?include=image: what it saw",
                json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
            ),
        ]
    ]


class Predictions(TypedDict):
    """The reply of /v1/predict, an entry for each image in their order."""

    request_id: Uuid
    model: Model
    predictions: list[Prediction]


class OneImage(TypedDict):
    """One image file."""

    image: Annotated[Base64, Field(description="a PNG, JPEG or WebP file, also as a data: URL")]


class SeveralImages(TypedDict):
    """Several image files."""

    images: Annotated[list[Base64], Field(min_length=1, max_length=MAX_IMAGES)]


class Instances(TypedDict):
    """Images as numbers."""

    instances: Annotated[list[Pixels], Field(min_length=1, max_length=MAX_IMAGES)]


Images = TypeAliasType("Images", OneImage | SeveralImages | Instances)

_NoParams = Annotated[None, WithJsonSchema({"type": ["object", "null"], "maxProperties": 0})]


class MlflowInstances(TypedDict):
    """MLflow's scoring protocol, as TensorFlow Serving has it."""

    instances: Annotated[list[Pixels], Field(min_length=1, max_length=MAX_IMAGES)]
    params: NotRequired[_NoParams]


class MlflowInputs(TypedDict):
    """MLflow's scoring protocol, in its own words."""

    inputs: Annotated[list[Pixels], Field(min_length=1, max_length=MAX_IMAGES)]
    params: NotRequired[_NoParams]


MlflowInput = TypeAliasType("MlflowInput", MlflowInstances | MlflowInputs)


class MlflowPredictions(TypedDict):
    """Ten probabilities for each image."""

    predictions: list[Annotated[list[Probability], Field(min_length=NUM_CLASSES, max_length=NUM_CLASSES)]]


# By its key, which bodies.py alone knows.
Form = TypedDict("Form", {FIELD: Annotated[list[File], Field(min_length=1, max_length=MAX_IMAGES)]})  # type: ignore[misc]


class Feedback(TypedDict):
    """What an image really shows."""

    request_id: Annotated[Uuid, Field(description="of a reply of /v1/predict")]
    label: Label
    index: NotRequired[
        Annotated[Count, Field(description="which of the reply's predictions", json_schema_extra={"default": 0})]
    ]


class FeedbackKept(TypedDict):
    """Feedback as it was kept."""

    request_id: Uuid
    index: Count
    label: Label


class Failure(TypedDict):
    """What went wrong last."""

    at: Time
    version: int | None
    message: str


class Challenger(TypedDict):
    """The version that gets a share of the traffic. Images are counted since the server started."""

    version: Annotated[int | None, Field(description="null where what is set cannot be read")]
    mode: Annotated[
        Literal["mirror", "canary"] | None,
        Field(description="mirror: the champion answers, and it sees the same images; canary: it answers"),
    ]
    share: Annotated[
        float | None,
        WithJsonSchema({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}),
        Field(description="of requests"),
    ]
    loaded: bool
    answered: Annotated[Count, Field(description="images of callers, which it answered")]
    mirrored: Annotated[Count, Field(description="images that it was shown unseen")]
    disagreed: Annotated[Count, Field(description="of those, on which it said another class than the champion")]
    failed: Annotated[Count, Field(description="images on which it failed; the champion answered")]
    dropped: Annotated[Count, Field(description="images not mirrored, since too many waited")]
    failure: Annotated[Failure | None, Field(description="why it gets nothing, or what could not be asked since")]


class ModelState(TypedDict):
    """The model that answers, and what came of those that were to follow it."""

    name: Annotated[str, Field(examples=["cifar10-classifier"])]
    version: Version
    alias: Annotated[str, Field(examples=["champion"])]
    data: Annotated[str, Field(description="what it learnt from: cifar-10, or SYNTHETIC", examples=["cifar-10"])]
    architecture: str
    weights: Annotated[str, Field(description="what training started from")]
    engine: Annotated[Literal["fp32", "int8"], Field(description="the form of the model that answers")]
    loaded_at: Time
    swaps: Annotated[int, Field(ge=1)]
    failed_swaps: Count
    failure: Annotated[
        Failure | None,
        Field(description="what went wrong last and is not mended yet; the model above goes on serving"),
    ]
    challenger: Annotated[
        Challenger | None, Field(description="the version that gets a share of the traffic; null where none does")
    ]


class Alive(TypedDict):
    """The process runs."""

    status: Literal["alive"]


class Ready(TypedDict):
    """It can predict."""

    status: Literal["ready"]
    model: Model


class Problem(TypedDict):
    """An error, as RFC 9457 has it."""

    type: Uri
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(description="what is wrong, and how to mend it")]
    instance: Uri
    request_id: Uuid
