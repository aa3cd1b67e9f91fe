"""Where the ranks of a group meet: a store that listens only on the address that the group uses."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from btm_scale.errors import LaunchError, PortTaken

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)  # of the rendezvous and of each collective, as in DeepSpeed
_OWN_NAME_SECONDS = 60.0  # the first rank's own host must resolve its name by then
_POLL_SECONDS = 1.0
_LOOPBACK_INTERFACE = "lo"


def init_process_group(backend: str, *, own_gpu: str = "") -> None:
    """Start this process's default group at the rendezvous that MASTER_ADDR and MASTER_PORT name.

    torch's own store listens on every interface of the first rank's host. This one listens on the rendezvous address,
    and if that is a loopback address, gloo and NCCL use the loopback interface too. Raises PortTaken if another
    process listens there, and LaunchError if the first rank cannot, or if another rank has the same GPU: `own_gpu` is
    the UUID of this rank's.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if is_loopback(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
    await_name(address, _OWN_NAME_SECONDS if rank == 0 else TIMEOUT.total_seconds())
    store = _store(rank, size, address, port)
    if own_gpu:
        require_alone_on(own_gpu, store, rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def await_name(address: str, seconds: float) -> None:
    """Wait until an address resolves: the name of a pod may be published after its ranks have started.

    Raises LaunchError if it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    is_logged = False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unresolved(address, error) from None
            if not is_logged:
                is_logged = True
                logger.warning("MASTER_ADDR=%s does not resolve yet (%s): waiting", address, error.strerror or error)
        time.sleep(_POLL_SECONDS)


def _unresolved(address: str, error: OSError) -> LaunchError:
    return LaunchError(f"Cannot resolve MASTER_ADDR={address}: {error.strerror or error}. Set an IP address.")


def _store(rank: int, size: int, address: str, port: int) -> dist.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens at MASTER_PORT itself
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"/worker/attempt_{attempt}", dist.TCPStore(address, port, size, False, TIMEOUT))
    descriptor = None
    if rank == 0:
        listener = listening_socket(address, port)
        port, descriptor = listener.getsockname()[1], listener.detach()  # any free port if 0 was given
    return dist.TCPStore(address, port, size, rank == 0, TIMEOUT, master_listen_fd=descriptor)


def require_alone_on(gpu: str, store: dist.Store, rank: int) -> None:
    """Raise LaunchError if another rank of the group has this GPU, which NCCL reports as an "unhandled error"."""
    holder = store.compare_set(f"gpu/{gpu}", "", str(rank)).decode()
    if holder != str(rank):
        raise LaunchError(
            f"Ranks {holder} and {rank} both have GPU {gpu} on {socket.gethostname()}. Each rank needs its own: show "
            "every rank all GPUs of its host (CUDA_VISIBLE_DEVICES), or each a different one (--gpus-per-task=1)."
        )


def is_loopback(address: str) -> bool:
    """Whether an address or host name means this host alone, wherever it is looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def listening_socket(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address of this host.

    Raises LaunchError if it has no such address, and PortTaken if the port is in use.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _unresolved(address, error) from None
    if ipaddress.ip_address(place[0]).is_loopback and not is_loopback(address):
        # Some hosts know their own name as 127.0.1.1, where other hosts cannot reach them.
        logger.warning("%s is %s on this host, so the rendezvous listens on all its interfaces", address, place[0])
        place = ("::" if family == socket.AF_INET6 else "0.0.0.0", port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"Cannot listen on {place[0]} port {port}: it is in use. Another process of this host has taken it. "
                "Start the group again with another MASTER_PORT."
            ) from None
        raise LaunchError(
            f"Cannot listen on {place[0]} port {port}: it is not an address of this host. "
            "MASTER_ADDR and MASTER_PORT must be an address and a free port of the host of rank 0."
        ) from None
    listener.listen(2048)
    return listener
