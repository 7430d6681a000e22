"""An S3 server on one disk: OpenStack Swift with a single copy, started as one program.

    S3_ACCESS_KEY=... S3_SECRET_KEY=... s3_server.py --data /var/lib/s3 --host 0.0.0.0 --port 9000

Swift is four servers and a daemon. The proxy speaks S3 and is the only one that others reach; the account, container
and object servers listen on loopback ports that are chosen at each start. An answered upload was synced to the disk,
listings show it at once, and `If-None-Match: *` holds: what clients of S3 rely on.

One disk is one copy: a lost disk is lost data, unless it was backed up. What an object is stands in its file's extended
attributes: stop the server, then copy the folder with them (`tar --xattrs`, `cp -a`), or copy through S3.
An object that was uploaded in parts and is overwritten leaves its old parts on the disk; a deleted one does not.
"""

import argparse
import ctypes
import fcntl
import os
import pwd
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift.common import utils
from swift.common.daemon import run_daemon
from swift.common.middleware.tempauth import TempAuth
from swift.common.ring import RingBuilder
from swift.common.swob import HTTPNotFound
from swift.common.wsgi import run_wsgi
from swift.obj.updater import ObjectUpdater

# Where an object lies on the disk follows from these: with others, the data that are there would not be found.
ACCOUNT = "AUTH_cifar10"
PATH_SUFFIX = "cifar10"
PARTITION_POWER = 4
DISK = "disk"

PR_SET_PDEATHSIG = 1
HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
BACKENDS = ("account", "container", "object")


class OneKey(TempAuth):  # type: ignore[misc]
    """Swift's own check of S3 signatures, for one key pair whose data stay the same when the pair is changed.

    TempAuth finds a user's data by the first half of an access key "account:user"; this pair is any two strings.
    """

    def __init__(self, app: Callable[..., Any], conf: dict[str, str]) -> None:
        super().__init__(app, conf)
        self.users = {
            os.environ["S3_ACCESS_KEY"]: {
                "key": os.environ["S3_SECRET_KEY"],
                "url": f"$HOST/v1/{ACCOUNT}",
                "groups": [".admin"],
            }
        }

    def handle(self, env: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Gives out no tokens: requests are signed, each for itself."""
        return HTTPNotFound()(env, start_response)


def one_key(_global: dict[str, str], **conf: str) -> Callable[..., OneKey]:
    """What `[filter:auth]` names."""
    return lambda app: OneKey(app, conf)


PIPELINE: dict[str, tuple[str, ...]] = {
    "catch_errors": (),
    "gatekeeper": (),
    "healthcheck": (),
    "listing_formats": (),
    "bulk": (),
    # The check of the pipeline knows filters for authentication by the names of Swift's own.
    "s3api": ("auth_pipeline_check = false", "max_upload_part_num = 10000"),
    "auth": (),
    "copy": (),
    # Else the parts of a deleted object wait for a daemon that does not run here, and stay on the disk.
    "slo": ("allow_async_delete = false", "max_manifest_segments = 10000"),
    "dlo": (),
    "versioned_writes": (),
}
"""The proxy's filters and their options: what S3 needs of Swift."""


def proxy_config(host: str, port: int, run: Path) -> str:
    """The server that speaks S3."""
    made_by = {name: f"use = egg:swift#{name}" for name in PIPELINE} | {
        "auth": "paste.filter_factory = s3_server:one_key"
    }
    filters = "\n".join("\n".join((f"[filter:{name}]", made_by[name], *PIPELINE[name])) for name in PIPELINE)
    return f"""
{_common(host, port, run)}
[pipeline:main]
pipeline = {" ".join(PIPELINE)} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
expose_info = false
{filters}
"""


def backend_config(name: str, port: int, data: Path, run: Path) -> str:
    """The account, container or object server."""
    return f"""
{_common("127.0.0.1", port, run)}
devices = {data}
mount_check = false
recon_cache_path = {run}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
[object-updater]
interval = 30
"""


def _common(host: str, port: int, run: Path) -> str:
    # workers = 0: each server is the one process that it is started as.
    return f"""[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = 0
swift_dir = {run}
user = {pwd.getpwuid(os.getuid()).pw_name}
log_level = WARNING"""


def write_ring(name: str, port: int, run: Path) -> None:
    """The map from objects to disks, of which there is one; no ring is kept, since each would say the same."""
    builder = RingBuilder(PARTITION_POWER, replicas=1, min_part_hours=1)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1.0, "ip": "127.0.0.1", "port": port, "device": DISK})
    builder.rebalance()
    builder.get_ring().save(str(run / f"{name}.ring.gz"))


def check_data(data: Path) -> None:
    """Makes the folder, holds it for this server, and tries what Swift needs of a file system.

    Raises:
        SystemExit: says what is missing.
    """
    disk = data / DISK
    try:
        disk.mkdir(parents=True, exist_ok=True)
        lock = os.open(data, os.O_RDONLY)  # never closed: it is held until this process and its servers end
        for _ in range(50):  # those of a killed predecessor are about to
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            sys.exit(f"Another S3 server uses {data}. Fix: stop it, or give this one a folder of its own.")
        os.setxattr(disk, "user.tried", b"yes")
    except OSError as error:
        sys.exit(
            f"{data} cannot hold an S3 server's data: {error.strerror}. Fix: give this user the right to write there, "
            "on a file system with extended attributes (ext4, xfs; no network share)."
        )


def check_port(host: str, port: int) -> None:
    """Swift shares a port with whoever else listens there, and each would get some of the requests.

    Raises:
        SystemExit: it is taken.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        sys.exit(f"{host}:{port} cannot be listened on: {error.strerror}. Fix: give a free --port.")


def start(work: Callable[[], object]) -> int:
    """Runs `work` in a process of its own, which shares the imported code's memory with this one."""
    child = os.fork()
    if child:
        return child
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        # Swift's servers leave this process' group: whoever kills it would leave them behind, holding the data.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        work()
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)
    except BaseException:  # noqa: BLE001 - the last line of defence of a process: whatever ended it is told
        traceback.print_exc()
    finally:
        os._exit(1)


def free_ports(count: int) -> list[int]:
    """Loopback ports where nobody listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def serve(data: Path, host: str, port: int, run: Path) -> int:
    """Starts all five and waits. Returns 0 when told to end, 1 when one of them ended by itself."""
    (run / "swift.conf").write_text(f"[swift-hash]\nswift_hash_path_suffix = {PATH_SUFFIX}\n")
    utils.set_swift_dir(str(run))
    ports = dict(zip(BACKENDS, free_ports(len(BACKENDS)), strict=True))
    for name in BACKENDS:
        write_ring(name, ports[name], run)
        (run / f"{name}.conf").write_text(backend_config(name, ports[name], data, run))
    (run / "proxy.conf").write_text(proxy_config(host, port, run))

    def server(name: str) -> Callable[[], object]:
        return lambda: sys.exit(run_wsgi(str(run / f"{name}.conf"), f"{name}-server", verbose=True))

    # Held back until they are waited for; `start` lets the servers have them.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    children = [start(server(name)) for name in (*BACKENDS, "proxy")]
    # Enters into its listing what a container server was too slow to take with the upload.
    children.append(start(lambda: run_daemon(ObjectUpdater, str(run / "object.conf"), verbose=True)))
    print(f"S3 server: http://{host}:{port}, data in {data}", flush=True)
    why = signal.sigwait(HELD)
    for child in children:
        os.kill(child, signal.SIGTERM)
    for child in children:
        os.waitpid(child, 0)
    return 1 if why == signal.SIGCHLD else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="An S3 server on one disk.")
    parser.add_argument("--data", type=Path, required=True, help="folder for the data")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on")
    given = parser.parse_args()
    for name in ("S3_ACCESS_KEY", "S3_SECRET_KEY"):
        if not os.environ.get(name):
            sys.exit(f"{name} is not set. Fix: set the key pair that clients sign with.")
    check_data(given.data)  # first: a predecessor that is still ending holds the port as well
    check_port(given.host, given.port)
    with tempfile.TemporaryDirectory(prefix="s3-") as run:
        return serve(given.data.absolute(), given.host, given.port, Path(run))


if __name__ == "__main__":
    sys.exit(main())
