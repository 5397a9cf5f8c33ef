"""The parts of bulk on Ray: on a cluster started here or one already running; its errors in one line."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from senticlip import runtime
from senticlip.progress import console
from senticlip.structures import UsageError, UserError

RETRIES = 8
"""Retries of a part whose worker died: a clip that kills every worker must not be retried forever."""


def on_ray(
    worker: type, job: dict[str, Any], todo: list[int], address: str | None, workers: int | None
) -> Iterator[int]:
    """Yield the number of each part in ``todo`` once its file is written.

    Actors hold the model, few parts are in flight, and the part of a worker that died is tried again.

    Args:
        worker: a class constructed with the job; its instances are called with batches of part numbers.
        job: see ``bulk``.
        todo: the numbers of the parts.
        address: of a running cluster; None starts one.
        workers: how many; by default one per GPU, or per core if there is none.

    Raises:
        UserError, UsageError: a worker's own. UserError: the cluster cannot be reached or started, or a worker failed.
    """
    import ray
    import ray.data

    # deprecated, but still the only way to set the number of retries
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    if address:
        _check_reachable(address)
    started_here = not ray.is_initialized()
    try:
        if started_here:
            _connect(address, workers)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpus = 0 if job["device"] == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        kind = "GPU" if gpus else "CPU"
        if address and ray.available_resources().get(kind, 0) < 1:
            console.print(f"--address {address}: waiting, every {kind} of the cluster is in use", highlight=False)
        # all cores go to workers: the read task, which only yields part numbers, costs nothing
        pool = min(workers or gpus or int(ray.cluster_resources()["CPU"]), len(todo))
        results = ray.data.from_items([{"id": number} for number in todo], override_num_blocks=len(todo)).map_batches(
            worker,
            fn_constructor_kwargs={"job": job, "threads": None if gpus else 1},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=1 if gpus else None,
            max_task_retries=RETRIES,
        )
        # only now, after Ray has set up its logging; errors are raised anyway
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield from (int(row["id"]) for row in results.iter_rows())
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise _as_user_error(error, address) from None
    finally:
        if started_here:
            ray.shutdown()


def _connect(address: str | None, workers: int | None) -> None:
    """Connect to a cluster, or start our own, even if another one runs on this machine."""
    import ray

    options: dict[str, Any] = {"address": address}
    if not address:
        options = {"address": "local", "include_dashboard": False, "num_cpus": max(workers or 0, runtime.cores())}
        if not (Path.home() / ".ray" / "auth_token").is_file():  # Ray would write one, for good
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    old_handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    if callable(old_handler):  # Ray's handler dumps the stack and aborts
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, old_handler)


def _as_user_error(error: Exception, address: str | None) -> UserError:
    """An error of Ray or a worker as a one-line UserError."""
    line = " ".join(str(error).split())
    if isinstance(error, ConnectionError) or type(error).__name__ == "AuthenticationError":
        message = f"--address {address or 'local'}: the Ray cluster refused the connection ({line[:120]})"
        message += " — is it the port of ray start --head (6379)? If the cluster requires a token"
        return UserError(f"{message}: set RAY_AUTH_MODE=token here, with its ~/.ray/auth_token")
    worker_errors = re.findall(r"senticlip\.structures\.(User|Usage)Error: (.*)", str(error))
    kind, line = worker_errors[-1] if worker_errors else ("User", f"a worker failed: …{line[-300:]}")
    return (UserError if kind == "User" else UsageError)(line)


def _check_reachable(address: str) -> None:
    """Check that something listens at the address: Ray would wait for minutes.

    Raises:
        UsageError: the address has a scheme (Ray's client cannot run this). UserError: nothing answers.
    """
    if "://" in address:
        raise UsageError(f"--address {address}: give the HOST:PORT of ray start --head (port 6379), without ://")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", "local"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers ({error})") from None
