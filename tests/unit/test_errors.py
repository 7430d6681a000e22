"""The tree that the module's docstring draws is the tree that the code has."""

import pickle
import re

import pytest

from ml import errors
from ml.errors import CifarError

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CifarError)]


def drawn():
    """{class name: its parent's name}, read from the docstring."""
    parents, path = {}, []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"^    ([│├└─ ]*)(\w+)", line):
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            parents[match[2]] = path[-2] if len(path) > 1 else None
    return parents


def test_the_drawing_is_the_code():
    assert drawn() == {kind.__name__: None if kind is CifarError else kind.__base__.__name__ for kind in ALL}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_says_the_fix_and_survives_a_process_boundary(kind):
    error = pickle.loads(pickle.dumps(kind("It broke.", fix="mend it.")))
    assert type(error) is kind
    assert str(error) == "It broke. Fix: mend it."
    assert (error.message, error.fix) == ("It broke.", "mend it.")


def test_none_there_and_could_not_ask_share_no_class_but_the_root():
    could_not_ask = {kind for kind in ALL if issubclass(kind, errors.ServiceUnavailable)}
    for kind in (errors.ModelNotFound, errors.RunNotFound, errors.DatasetNotFound, errors.PredictionNotFound):
        assert could_not_ask.isdisjoint(kind.__mro__)
