"""Send a job to a cluster, follow its log, and send it again if a restart may cure what it died of.

The same command resumes its run, and the run's lease keeps a second job out, so sending it once too often
does no harm. What remains is to tell a job that failed from one that was lost with its head, and both from a
job server that is out of reach for a while.
"""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from jebm.cli import STOPPED, tell
from jebm.errors import ConfigError

__all__ = ["Ending", "ending_of", "supervise"]

_LOG = logging.getLogger("jebm.on_ray")
_ANSWER_SECONDS = 30.0
_LOOK_SECONDS = 5.0
_QUIET_SECONDS = 10.0  # without a line of the log before the server is asked whether it is still there
_AWAY_SECONDS = 3600.0  # without an answer
_UPLOAD_SECONDS = 3600.0
_LAST_LOG_SECONDS = 300.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_ACCEPTED_SECONDS = 600.0  # a start that refuses its command takes less
_USERS, _SIGNALS = 2, (130, 143, -2, -15)  # exit codes of a driver: docs/operations.md
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ending:
    """How a job has ended: why, its exit code (1 if it has none), and whether a restart may cure it."""

    reason: str
    code: int
    curable: bool


def ending_of(info: JobDetails, last_line: str, *, accepted: bool) -> Ending:
    """Judge the end of a job by its driver's exit code and the last line of its log.

    A command that was `accepted` before and is refused now (exit code 2, an environment that cannot be built)
    lacks something that may return, such as nodes that have not yet joined the new head. So does one that has
    run for longer than a start takes, such as the storage.
    """
    ran = ((info.end_time or 0) - (info.start_time or 0)) / 1000
    accepted = accepted or ran > _ACCEPTED_SECONDS
    code: int | None = info.driver_exit_code
    if info.status == JobStatus.SUCCEEDED:
        return Ending("finished", 0, curable=False)
    if info.status == JobStatus.STOPPED or code == STOPPED:
        return Ending("was stopped", STOPPED, curable=False)
    if code is None:
        users = info.error_type == JobErrorType.RUNTIME_ENV_SETUP_FAILURE
        return Ending(f"died: {info.message}", _USERS if users else 1, curable=accepted or not users)
    # Its driver ran, and ended with an error.
    final = code in _SIGNALS or last_line.startswith("diverged: ") or (code == _USERS and not accepted)
    return Ending(f"died with exit code {code}", code if code > 0 else 1, curable=not final)


def supervise(address: str, entrypoint: str, runtime_env: dict[str, Any], restarts: int) -> int:
    """Run a command as a job of the cluster, at most 1 + `restarts` times; return its exit code, or 1.

    Prints the job's log on stdout, and logs what is done. Ctrl-C leaves the job running and returns 130.

    Raises:
        ConfigError: the environment is wrong; no job server answers at the address, it refuses the token or
            the job; later, it does not answer for an hour.
    """
    try:
        RuntimeEnv(**runtime_env)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"runtime-env: {_line(error)}") from error
    name, pause = f"jebm-{uuid.uuid4().hex[:8]}", _FIRST_PAUSE_SECONDS
    job = _Job(address, f"{name}-1")
    try:
        job.send(entrypoint, runtime_env)
        for restart in range(1, restarts + 2):
            end = job.end(accepted=restart > 1)
            if not end.curable or restart > restarts:
                break
            _LOG.warning(
                "%s %s; the same command again in %.0f s, restart %d of %d",
                *(job.name, end.reason, pause, restart, restarts),
            )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            job = _Job(address, f"{name}-{restart + 1}")
            job.send(entrypoint, runtime_env, patient=True)
    except KeyboardInterrupt:
        runs = job.runs()
        state = "does not run" if runs is False else "runs on" if runs else "may run on"
        ended = "" if runs is False else f"; ray job stop {job.name} ends it"
        _LOG.warning("detached; %s %s, and is not restarted%s", job.name, state, ended)
        return 130
    given_up = f", after restart {restarts} of {restarts}" if end.curable and restarts else ""
    _LOG.info("%s %s%s", job.name, end.reason, given_up)
    return end.code


class _Client(JobSubmissionClient):
    """Ray's client with a limit of time; Ray's own waits for a host that has vanished without a word."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:  # noqa: ANN401 (Ray's own type)
        seconds = _UPLOAD_SECONDS if method == "PUT" else _ANSWER_SECONDS
        return super()._do_request(method, endpoint, timeout=seconds, **more)


class _Job:
    """One submission."""

    def __init__(self, address: str, name: str) -> None:
        self.name, self._address = name, address
        self._log, self._printed, self._last_line = "", 0, ""

    def send(self, entrypoint: str, runtime_env: dict[str, Any], *, patient: bool = False) -> None:
        """Submit the job; `patient` is for a server that may still be starting."""
        since = time.monotonic()
        while True:
            try:
                client = _Client(self._address)
                client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, submission_id=self.name)
            except AuthenticationError as error:
                raise ConfigError(_refused(self._address)) from error
            except (OSError, RuntimeError, ValueError) as error:
                if not self._received():
                    if not patient or time.monotonic() - since > _AWAY_SECONDS:
                        raise ConfigError(f"RAY_ADDRESS: {_line(error)}{_remedy(error)}") from error
                    time.sleep(_LOOK_SECONDS)
                    continue
            _LOG.info("sent %s to %s: %s", self.name, self._address, entrypoint)
            return

    def runs(self) -> bool | None:
        """Return whether the server has this job and it has not ended; None if the server does not answer."""
        try:
            info = self._info(_Client(self._address))
        except (OSError, RuntimeError, AuthenticationError):
            return None
        return info is not None and not info.status.is_terminal()

    def _received(self) -> bool:
        """Return whether the server has this job: then only its answer was lost."""
        try:
            return self._info(_Client(self._address)) is not None
        except (OSError, RuntimeError):
            return False

    def end(self, *, accepted: bool) -> Ending:
        """Print the job's log until it ends; return how it ended."""
        heard = time.monotonic()
        away = False
        while True:
            try:
                client = _Client(self._address)
                info = self._info(client)
                if info is None:
                    return Ending("was lost with the head, which has been started anew", 1, curable=True)
                if info.status.is_terminal():
                    # The rest of its log may have gone with the head that it ran on.
                    with contextlib.suppress(OSError, RuntimeError, ClientError):
                        asyncio.run(asyncio.wait_for(self._follow(client), _LAST_LOG_SECONDS))
                    self._print("\n" if self._log else "")
                    return ending_of(info, self._last_line, accepted=accepted)
                heard, away = time.monotonic(), False
                asyncio.run(self._follow(client))
            except AuthenticationError as error:
                raise ConfigError(_refused(self._address)) from error
            except (OSError, RuntimeError, ClientError) as error:
                if time.monotonic() - heard > _AWAY_SECONDS:
                    raise ConfigError(f"RAY_ADDRESS: {_line(error)}, for an hour{_remedy(error)}") from error
                if not away:
                    _LOG.warning("no answer from %s (%s); waiting for it", self._address, _line(error))
                away = True
            time.sleep(_LOOK_SECONDS if away else 1.0)

    def _info(self, client: JobSubmissionClient) -> JobDetails | None:
        """Return the job's state; None if the server does not know it."""
        try:
            return client.get_job_info(self.name)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise

    async def _follow(self, client: JobSubmissionClient) -> None:
        """Print the log from where it was left until the job ends; raise if the server goes away."""
        chunks = aiter(client.tail_job_logs(self.name))
        skip = self._printed  # it comes from its beginning
        while True:
            coming = asyncio.ensure_future(anext(chunks))
            while not (await asyncio.wait({coming}, timeout=_QUIET_SECONDS))[0]:
                client.get_job_info(self.name)
            try:
                chunk = coming.result()
            except StopAsyncIteration:
                return
            self._print(chunk[skip:])
            skip = max(0, skip - len(chunk))

    def _print(self, chunk: str) -> None:
        """Print the lines that a piece of the log completes."""
        self._printed += len(chunk)
        *lines, self._log = (self._log + chunk).split("\n")
        for line in lines:
            self._last_line = _COLOURS.sub("", line).rstrip("\r")
            tell(self._last_line)


def _refused(address: str) -> str:
    return (
        f"RAY_ADDRESS: {address} refuses the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the "
        "cluster's"
    )


def _remedy(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return ""
    return "; start the cluster there, or open the way to it, as with ssh -N -L 8265:127.0.0.1:8265 HOST"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
