"""Ports are asked before anything starts."""

import os
import socket

import pytest

from ml.errors import PortTaken
from ml.stack.ports import require_free


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_free_ports_pass(taken):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    require_free({"API_PORT": free})


def test_a_taken_port_is_named_with_its_holder_and_the_setting_that_moves_it(taken):
    with pytest.raises(PortTaken) as caught:
        require_free({"API_PORT": taken})
    assert f"port {taken} (API_PORT)" in caught.value.message
    assert f"pid {os.getpid()}" in caught.value.message
    assert "API_PORT=" in caught.value.fix


def test_two_parts_on_one_port_are_refused():
    with pytest.raises(PortTaken, match="API_PORT=8000, MLFLOW_PORT=8000"):
        require_free({"API_PORT": 8000, "MLFLOW_PORT": 8000})
