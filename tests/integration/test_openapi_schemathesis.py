"""Schemathesis asks every route of the document, in form and out of it: the app does what its document says."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from tests.served_app import PIXELS, Served, encoded

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
EXAMPLES = 25

for kind, format_ in [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")]:
    schemathesis.openapi.media_type(kind, st.just(encoded(PIXELS, format_)) | st.binary(max_size=64))


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    from ml.settings import Settings

    served = Served(tmp_path_factory.mktemp("served"), Settings(_env_file=None))
    served.follower.poll()

    def from_this_machine(environ, start_response):
        return served.app(environ | {"REMOTE_ADDR": "127.0.0.1"}, start_response)

    made = schemathesis.openapi.from_wsgi("/openapi.json", from_this_machine)
    made.config.checks.negative_data_rejection.expected_statuses = ["4XX"]
    return made


OPERATIONS = [
    *(("POST", path) for path in ("/v1/predict", "/v1/feedback", "/invocations")),
    *(("GET", path) for path in ("/v1/model", "/metrics", "/healthz", "/readyz", "/ping", "/")),
    ("GET", "/static/{filename}"),
]


def test_no_route_is_left_out(schema):
    assert {(op.ok().method.upper(), op.ok().path) for op in schema.get_all_operations()} == set(OPERATIONS)


TAKES_SOMETHING = [operation for operation in OPERATIONS if operation[0] == "POST"]
CASES = [
    *((*operation, GenerationMode.POSITIVE) for operation in OPERATIONS),
    *((*operation, GenerationMode.NEGATIVE) for operation in TAKES_SOMETHING),
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_replies_are_as_the_document_says(schema, method, path, mode):
    statuses = set()

    # The same examples in every run: whoever changed nothing here is not stopped by a find of today.
    @hypothesis.settings(
        max_examples=EXAMPLES, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        reply = case.call()
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=CHECKS)

    ask()
    # Nobody guesses the name of a file, or of a prediction.
    found = {404} if path in ("/static/{filename}", "/v1/feedback") else {200}
    assert statuses & (found if mode.is_positive else {400, 422})
