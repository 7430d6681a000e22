"""The S3 server of deploy/docker/s3, as a process of the tests' own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
from botocore.config import Config

from tests.conftest import answers, free_port, stop, wait_until

PROGRAM = Path(__file__).parents[1] / "deploy" / "docker" / "s3" / "s3_server.py"
ACCESS_KEY, SECRET_KEY = "tests-access-key", "tests-secret-key"


class S3Process:
    """A server that can be stopped and started to play an outage."""

    def __init__(self, data: Path) -> None:
        self.data, self.port = data, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        environment = os.environ | {"S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": SECRET_KEY}
        log = self.data.with_suffix(".log")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, "--data", self.data, "--port", str(self.port)],
                env=environment,
                process_group=0,
                stdout=output,
                stderr=output,
            )

        def healthy() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the S3 server ended: {log.read_text()}")
            return answers(f"{self.url}/healthcheck")

        wait_until(healthy, seconds=60, what="the S3 server")

    def stop(self, how: int = signal.SIGTERM) -> None:
        stop(self.process, how)

    def environment(self) -> dict[str, str]:
        """What its clients are told."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY):
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}),
        )

    def names(self, bucket: str) -> list[str]:
        """All objects of a bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
