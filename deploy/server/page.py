"""The page at `/`, where a person can try the model. Its behaviour is `static/page.js`; it talks to the same API."""

from flask import Blueprint, render_template

from deploy.server.access import Gate
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.openapi import Reply, describes
from ml.datasets.labels import CLASS_NAMES
from ml.serving.decoding import FORMATS, MAX_PIXELS


def blueprint(gate: Gate) -> Blueprint:
    """GET /."""
    routes = Blueprint("page", __name__)

    @routes.get("/")
    @describes(
        "A page to try it",
        {200: Reply("HTML", media_type="text/html", schema={"type": "string"})},
        open_to_all=True,
    )
    def index() -> str:
        return render_template(
            "page.html",
            labels=CLASS_NAMES,
            types=",".join(FORMATS),
            max_pixels=MAX_PIXELS,
            max_bytes=MAX_BODY_BYTES,
            asks_for_key=gate.asks_for_key,
        )

    return routes
