"""`jebm` for tests of many commands: a process that has imported torch and ray forks for each of them.

Importing takes 3 to 8 s of each command. A fork has the caller's arguments, folder, variables and files, as
a new process has; what is not tested here is the import itself.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(1)
sys.exit(answer[0] if answer else 1)
"""


@contextlib.contextmanager
def preloaded_jebm(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Put a program `jebm` into a folder; it works until the context ends."""
    address = str(folder / "socket")
    (folder / "jebm").write_text(CLIENT.format(python=sys.executable, address=address))
    (folder / "jebm").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno())]
        server = subprocess.Popen(
            command, env=environment, pass_fds=[listener.fileno()], start_new_session=True
        )
    try:
        yield
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            with contextlib.suppress(psutil.NoSuchProcess):  # with commands that have not ended
                process.kill()
        server.wait()


def serve(listener: socket.socket) -> None:
    """Answer each request in two forks: one runs the command, the other waits for its exit code."""
    # No folder of the caller's: the test's own, in which this file lies, and what ray has put before it.
    sys.path.remove(str(Path(__file__).parent))
    import optuna  # noqa: F401
    import ray.train.torch
    import ray.tune  # noqa: F401

    from jebm.commands import compare, evaluate, main, train  # noqa: F401

    while True:
        connection, _ = listener.accept()
        with connection:
            if os.fork():
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended
                        pass
                continue
            listener.close()
            head, files, _, _ = socket.recv_fds(connection, 4, 3)
            request = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
            if command := os.fork():
                for file in files:
                    os.close(file)
                ended = os.pidfd_open(command)
                if connection in select.select([connection, ended], [], [])[0]:  # the caller is gone
                    for kill in (os.killpg, os.kill):  # it may not have a group yet
                        with contextlib.suppress(ProcessLookupError):
                            kill(command, signal.SIGKILL)
                    os._exit(0)
                code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
                connection.sendall(bytes([code & 255]))
                os._exit(0)
        break
    os.setsid()
    arguments, folder, variables = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["jebm", *arguments]
    sys.path.insert(0, folder)
    main()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
