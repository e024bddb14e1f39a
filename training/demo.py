"""A page to play with a run: draw images, and see which experts serve which noise level.

    pip install -r requirements-demo.txt
    python -m training.demo runs/demo

Unless --host says otherwise, only this machine can open it. The page loads nothing from elsewhere
and reports nothing to anybody.
"""

import argparse
import errno
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from training.playground.playground import Playground
from training.ranks.process_group import enter_job, select_accelerator
from training.sampling.flags import (
    add_precision_flag,
    add_run_argument,
    add_vae_flag,
    check_precision,
)

REQUIREMENTS = "requirements-demo.txt"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860
MAX_PORT = 65535
MAX_UPLOAD = "1kb"  # the page has nothing to upload, but gradio's server takes files
LEAVE_SEC = 2  # for browsers' open connections at the end


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_argument(parser)
    add_vae_flag(parser)
    add_precision_flag(parser)
    parser.add_argument(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help=f"of this machine, to listen at; others than {DEFAULT_HOST} let others in "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help="0 = any free one (default: %(default)s)",
    )
    return parser


def check_gradio() -> None:
    """Refuse to begin without what the page is made with."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "gradio, which the page is made with, is not installed; run 'pip install -r "
            f"{REQUIREMENTS}'."
        )


def listen(host: str, port: int) -> socket.socket:
    """Open the port; nobody is answered yet."""
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port {port}: is no port; choose one from 0 to {MAX_PORT}.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError) as err:
        raise ConfigError(f"--host {host}: is no address ({err}); use {DEFAULT_HOST}.") from err
    except OSError as err:
        is_foreign = err.errno == errno.EADDRNOTAVAIL
        where = f"--host {host}" if is_foreign else f"--port {port}"
        raise ConfigError(
            f"{where}: cannot be listened at ({os.strerror(err.errno)}); choose another."
        ) from err
    return listener


def serve(playground: Playground, listener: socket.socket) -> None:
    """Answer browsers until SIGINT or SIGTERM."""
    host, port = listener.getsockname()[:2]
    is_private = ipaddress.ip_address(host).is_loopback
    with tempfile.TemporaryDirectory(prefix="switch-dit-demo-") as folder:
        # Read by gradio when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/gradio", "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from fastapi.middleware.trustedhost import TrustedHostMiddleware

        from training.playground.page import CSS, build_page

        app = FastAPI(openapi_url=None)
        if is_private:  # else a web site whose name is made to point here could read the page
            names = ["localhost", "127.0.0.1", "[::1]", host]
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
        gradio.mount_gradio_app(
            app,
            build_page(playground, Path(folder) / "drawn"),
            "/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=MAX_UPLOAD,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
        )
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LEAVE_SEC)
        server = uvicorn.Server(settings)

        def leave(*_: object) -> None:
            playground.close()
            # It would report every answer that is cut off.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = True

        server.handle_exit = leave  # its own repeats the signal, and the folder would stay
        print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])


def main(argv: list[str] | None = None) -> None:
    """Serve the page of the command line's run."""
    with exit_on_config_error():
        args = build_parser().parse_args(argv)
        check_gradio()
        device = select_accelerator(enter_job())
        check_precision(args.precision, device)
        with listen(args.host, args.port) as listener:
            if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
                sys.stderr.write(
                    f"warning: --host {args.host}: whoever reaches this machine can use the page, "
                    f"without a password; {DEFAULT_HOST} and an ssh tunnel keep it to yourself.\n"
                )
            serve(Playground(args.run_dir, device, args.vae, args.precision), listener)


if __name__ == "__main__":
    enter(main)
