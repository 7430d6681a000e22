"""The S3 server of deploy/docker/s3: what clients of S3 rely on, across restarts."""

import io
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

if sys.platform != "linux":
    pytest.skip("the server runs on Linux", allow_module_level=True)

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from tests.conftest import free_port
from tests.s3_process import ACCESS_KEY, PROGRAM, SECRET_KEY, S3Process

MIB = 2**20
IN_PARTS = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = S3Process(tmp_path_factory.mktemp("s3") / "data")
    server.client().create_bucket(Bucket="bucket")
    yield server
    server.stop()


def refusal(call, **arguments):
    with pytest.raises(ClientError) as error:
        call(**arguments)
    return error.value.response["Error"]["Code"]


def stored_bytes(server):
    return sum(path.stat().st_size for path in server.data.rglob("*.data"))


def test_what_was_answered_outlives_a_kill(server):
    content = os.urandom(12 * MIB)
    server.client().put_object(Bucket="bucket", Key="folder/small", Body=b"small", Metadata={"kind": "test"})
    server.client().upload_fileobj(io.BytesIO(content), "bucket", "folder/large", Config=IN_PARTS)
    server.stop(signal.SIGKILL)
    server.start()
    s3 = server.client()
    assert server.names("bucket") == ["folder/large", "folder/small"]
    assert s3.get_object(Bucket="bucket", Key="folder/large")["Body"].read() == content
    part = s3.get_object(Bucket="bucket", Key="folder/large", Range=f"bytes={6 * MIB}-{6 * MIB + 9}")
    assert part["Body"].read() == content[6 * MIB :][:10]
    assert s3.head_object(Bucket="bucket", Key="folder/small")["Metadata"] == {"kind": "test"}


def test_a_deleted_object_leaves_the_disk_with_all_its_parts(server):
    before = stored_bytes(server)
    server.client().upload_fileobj(io.BytesIO(os.urandom(12 * MIB)), "bucket", "parts", Config=IN_PARTS)
    assert stored_bytes(server) >= before + 12 * MIB
    server.client().delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "parts"}, {"Key": "never there"}]})
    assert "parts" not in server.names("bucket")
    assert stored_bytes(server) < before + MIB


def test_who_does_not_sign_with_the_key_pair_gets_nothing(server):
    server.client().put_object(Bucket="bucket", Key="secret", Body=b"1")
    wanted = {"Bucket": "bucket", "Key": "secret"}
    assert refusal(server.client(secret_key="wrong").get_object, **wanted) == "SignatureDoesNotMatch"
    assert refusal(server.client(secret_key="wrong").put_object, **wanted, Body=b"2") == "SignatureDoesNotMatch"
    assert refusal(server.client(access_key="wrong").get_object, **wanted) == "SignatureDoesNotMatch"
    for path in ("/bucket/secret", "/v1/AUTH_cifar10/bucket/secret", "/v1/AUTH_cifar10", "/auth/v1.0", "/info"):
        reply = httpx.get(f"{server.url}{path}", headers={"X-Auth-User": ACCESS_KEY, "X-Auth-Key": SECRET_KEY})
        assert reply.status_code in (400, 401, 403, 404), (path, reply.text)
    assert server.client().get_object(**wanted)["Body"].read() == b"1"


def test_a_precondition_is_no_ornament(server):
    s3 = server.client()
    s3.put_object(Bucket="bucket", Key="once", Body=b"first", IfNoneMatch="*")
    again = {"Bucket": "bucket", "Key": "once", "Body": b"second", "IfNoneMatch": "*"}
    assert refusal(s3.put_object, **again) == "PreconditionFailed"
    assert s3.get_object(Bucket="bucket", Key="once")["Body"].read() == b"first"


def test_a_page_of_a_listing_goes_on_where_the_last_one_ended(server):
    s3 = server.client()
    for number in range(7):
        s3.put_object(Bucket="bucket", Key=f"pages/{number}/file", Body=b"")
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", Prefix="pages/", Delimiter="/", PaginationConfig={"PageSize": 3}
    )
    folders = [[entry["Prefix"] for entry in page["CommonPrefixes"]] for page in pages]
    assert folders == [[f"pages/{number}/" for number in numbers] for numbers in ((0, 1, 2), (3, 4, 5), (6,))]


def test_a_part_that_dies_ends_the_server(tmp_path):
    """Half a server would answer some requests; one that ends is started again."""
    server = S3Process(tmp_path / "data")
    children = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
    assert server.process.wait(20) == 1
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "something of it lives on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("how", "said"),
    [("the same folder", "Another S3 server uses"), ("the same port", "Address already in use"), ("no key", "not set")],
)
def test_it_does_not_start_where_it_cannot_serve(how, said, server, tmp_path):
    keys = {"S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": "" if how == "no key" else SECRET_KEY}
    data = server.data if how == "the same folder" else tmp_path
    port = server.port if how == "the same port" else free_port()
    command = [sys.executable, PROGRAM, "--data", data, "--port", str(port)]
    ended = subprocess.run(command, env=os.environ | keys, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Fix: " in ended.stderr
