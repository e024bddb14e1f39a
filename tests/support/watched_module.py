"""Run a module as `python -m` does, and write down every address that it looks up or sends to.

python tests/support/watched_module.py FILE MODULE ARGUMENTS
"""

import os
import runpy
import sys
from pathlib import Path

# Where in the event's arguments the address is.
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
}

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    file, module = sys.argv[1:3]
    sys.argv[:3] = [module]
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event, arguments):
        if event in EVENTS:
            os.write(log, f"{event} {arguments[EVENTS[event]]}\n".encode())

    sys.addaudithook(watch)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
