"""llama.cpp's converter, loaded once: that takes it seconds, and to convert a tiny model tenths of a second.

As a program this loads the converter with all that it imports, and forks a child for each conversion: none sees what
another one did. It is asked through a script that stands in for the converter's.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

_STAND_IN = """import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({!r})
socket.send_fds(connection, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
sys.exit(connection.recv(1)[0])
"""


@contextlib.contextmanager
def warm(script: Path) -> Iterator[Path]:
    """Yields a script that does what the converter's `script` does, sooner."""
    with tempfile.TemporaryDirectory() as folder:
        stand_in, address = Path(folder, "converter.py"), str(Path(folder, "socket"))
        stand_in.write_text(_STAND_IN.format(address))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            command = [sys.executable, __file__, str(script), str(listener.fileno())]
            process = subprocess.Popen(command, pass_fds=[listener.fileno()])
        try:
            yield stand_in
        finally:
            process.kill()
            process.wait()


def _serve(script: str, listener: socket.socket) -> None:
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script)  # only imports, as its name is not __main__
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.sendall(bytes([_converted(script, connection)]))
            os._exit(0)
        connection.close()


def _converted(script: str, connection: socket.socket) -> int:
    """Runs the converter as the stand-in was run. Returns its exit status."""
    asked, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    for i, file in enumerate(files):
        os.dup2(file, i)
    folder, arguments = json.loads(asked)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
