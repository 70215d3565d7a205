"""How the ranks that torchrun has started find each other."""

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from secateur.distributed.collectives import ALONE, Ranks
from secateur.distributed.liveness import Liveness, Peer, RankFailedError
from secateur.utils.errors import InputError, first_line

JOINING = timedelta(minutes=5)  #: most that all ranks may take to start
NO_LIMIT = timedelta(days=3650)  #: of a collective: the rank that it waits for may work for hours


def join(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of this program, as torchrun says; a process that is alone gets itself.

    Call it once, in the main thread. From then on this process ends when another rank ends, until
    it :func:`leaves <leave>`.

    Raises:
        InputError: what torchrun says is incomplete, or the other ranks don't start or can't be
            reached.
        RankGoneError: another rank ended meanwhile.
    """
    given = {n: environment.get(n, "") for n in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    world = environment.get("WORLD_SIZE", "1")
    if world == "1" or not all(given.values()):
        return ALONE
    try:
        rank, world_size = int(given["RANK"]), int(world)
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world))
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
        server = dist.TCPStore(  # type: ignore[attr-defined]
            given["MASTER_ADDR"],
            int(given["MASTER_PORT"]),
            is_master=rank == 0 and not hosted,
            timeout=JOINING,
            wait_for_workers=False,
        )
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"secateur-{attempt}", server)  # type: ignore[attr-defined]
        hosts = _started(store, rank, world_size)
        if rank:
            peers = {0: _reached(store, rank, hosts[0])}
        else:
            own = _address(given["MASTER_ADDR"], int(given["MASTER_PORT"]))
            peers = _accepted(store, own, hosts)
    except InputError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"rank {given['RANK']} of {world} does not reach the others at "
            f"{given['MASTER_ADDR']}:{given['MASTER_PORT']} ({first_line(error)}). Start it by "
            f"torchrun."
        ) from error
    speaks = rank == min((r for r in range(1, world_size) if hosts[r] == hosts[rank]), default=0)
    liveness = Liveness(rank, world_size, peers, speaks)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=NO_LIMIT
        )
    except RuntimeError as error:
        raise _unable(liveness, first_line(error)) from error
    return Ranks(rank, world_size, local_world_size, liveness=liveness)


def _unable(liveness: Liveness, reason: str) -> BaseException:
    """Why a rank can't join the others; the leader says it where no other rank has ended."""
    explained = liveness.explained(reason)
    if liveness.trouble() is not None:
        return explained
    message = f"rank {liveness.rank} of {liveness.world_size} can't join the others ({reason})."
    liveness.fail(message if liveness.rank else "", True)
    return RankFailedError("") if liveness.rank else InputError(message)


def leave(ranks: Ranks) -> None:
    """Part from the other ranks when all work is done; all ranks call it."""
    if ranks.liveness is not None:
        ranks.barrier()
        ranks.liveness.leave()
        dist.destroy_process_group()


def _started(store: Any, rank: int, world_size: int) -> list[str]:
    """The machine of every rank, once all have started; by the number of the rank.

    Raises:
        InputError: some have not, and the message names them.
        RankFailedError: likewise, where another rank has said so.
    """
    store.set(f"host/{rank}", socket.gethostname())
    keys = [f"host/{other}" for other in range(world_size)]
    until = time.monotonic() + JOINING.total_seconds()
    while not store.check(keys):
        if time.monotonic() > until:
            absent = [number for number, key in enumerate(keys) if not store.check([key])]
            if store.add("absence", 1) > 1:
                raise RankFailedError("")
            raise _absence(absent, world_size)
        time.sleep(0.05)
    return [store.get(key).decode() for key in keys]


def _absence(ranks: list[int], world_size: int) -> InputError:
    named = ", ".join(map(str, ranks))
    subject, verb = (f"rank {named}", "has") if len(ranks) == 1 else (f"ranks {named}", "have")
    return InputError(
        f"{subject} of {world_size} {verb} not started within {JOINING.total_seconds() / 60:.3g} "
        f"minutes. Let every machine start its ranks, by torchrun."
    )


def _address(master: str, port: int) -> str:
    """Where other machines reach this one, which reaches the store at ``master``."""
    family, kind, *_, place = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as found:
        found.connect(place)  # sends nothing
        own = str(found.getsockname()[0])
    return master if own == "::1" or own.startswith("127.") else own  # the store is here


def _accepted(store: Any, address: str, hosts: list[str]) -> dict[int, Peer]:
    """The leader's connections with all other ranks."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    peers: dict[int, Peer] = {}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
        server.settimeout(JOINING.total_seconds())
        store.set("leader", json.dumps([address, server.getsockname()[1]]))
        while len(peers) < len(hosts) - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = [rank for rank in range(1, len(hosts)) if rank not in peers]
                raise _absence(absent, len(hosts)) from None
            rank = int.from_bytes(connection.recv(4))
            if rank in range(1, len(hosts)) and rank not in peers:
                peers[rank] = Peer(connection, rank, hosts[rank])
            else:  # a stranger
                connection.close()
    return peers


def _reached(store: Any, rank: int, host: str) -> Peer:
    """The connection of another rank with the leader."""
    address, port = json.loads(store.get("leader"))
    connection = socket.create_connection((address, port), JOINING.total_seconds())
    connection.sendall(rank.to_bytes(4))
    return Peer(connection, 0, host)
