"""`python -m medhead_app` and `medhead chat`: the chat page, and the API beside it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib.util import find_spec
from typing import Any

from medhead.cli.common import Parser, guarded
from medhead.errors import MedheadError
from medhead_app.startup import add_limit_options, add_model_options, check_numbers, load_service

PROG = "medhead_app"
LOCAL = ("127.0.0.1", "localhost", "::1")
EXAMPLES = """\
examples:
  python -m medhead_app                                        the demo model; open the address that it prints
  python -m medhead_app --model Qwen/Qwen3-0.6B --proposer recycling --port 8000
  python -m medhead_app --model my/model --heads my/heads --no-page       the API alone, without gradio
  python -m medhead_app --host 0.0.0.0 --auth me:secret                   for other machines in the network

It listens on this machine alone unless --host or --share say otherwise. Stop it with Ctrl-C.
exit codes: 0 done, 2 wrong input, 1 failure, 130 stopped with Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    options = Parser(
        prog=PROG,
        description="A chat page that shows what speculation does, and an OpenAI-compatible API beside it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(options)
    where = options.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=7860, help="port (default: 7860; 0: a free one)")
    where.add_argument("--share", action="store_true", help="a public address through Gradio's servers (needs network)")
    where.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these; the password is also the API key")
    where.add_argument("--no-page", action="store_true", help="the API alone; gradio need not be installed")
    add_limit_options(options)
    return options


def read_auth(given: str | None) -> tuple[str, str] | None:
    """User and password.

    Raises:
        MedheadError: not of the form USER:PASSWORD.
    """
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user or not password:
        raise MedheadError("--auth must be USER:PASSWORD, both with at least one character")
    return user, password


def run(args: argparse.Namespace) -> None:
    """The command after its options were read."""
    check_numbers(args)
    if not 0 <= args.port < 2**16:
        raise MedheadError(f"--port must be from 0 to 65535, got {args.port}")
    if args.share and args.no_page:
        raise MedheadError("--share opens a way to the page; leave out --no-page")
    auth = read_auth(args.auth)
    _check_installed(page=not args.no_page)
    from medhead_app.guards import LOCAL_HOSTS
    from medhead_app.listen import Server, address_of, bind
    from medhead_app.server import build_app

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    bound = bind(args.host, args.port)
    try:
        service = load_service(args, PROG)
        try:
            page, look = (None, None) if args.no_page else _page(service)
            hosts = LOCAL_HOSTS if args.host in LOCAL and not args.share else None
            server = Server(build_app(service, page, look, auth=auth, hosts=hosts), service)
            address = address_of(bound, args.host if args.host in LOCAL else None)
            _say(address, args, _shared(bound.getsockname()[1]) if args.share else None)
            server.run(sockets=[bound])
        finally:
            service.close()
    finally:
        bound.close()


def _check_installed(page: bool) -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if page else [])):
        if find_spec(name) is None:
            alone = " (or --no-page: the API alone)" if name == "gradio" else ""
            raise MedheadError(f"{name} is not installed: pip install 'medhead[app]'{alone}")


def _page(service: Any) -> tuple[Any, dict[str, Any]]:
    from medhead_app.chat.build import build_page
    from medhead_app.chat.theme import look

    return build_page(service), look()


def _shared(port: int) -> str:
    import secrets

    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise MedheadError(f"--share: no public address to be had ({reason}); it needs the network") from None


def _say(address: str, args: argparse.Namespace, shared: str | None) -> None:
    if not args.no_page:
        print(f"{PROG}: open {address}", file=sys.stderr)
    print(f"{PROG}: API at {address}/v1, numbers at {address}/metrics; Ctrl-C ends it", file=sys.stderr)
    if shared is not None:
        print(f"{PROG}: everybody can reach it at {shared}", file=sys.stderr)
    if args.auth is None and (shared is not None or args.host not in LOCAL):
        print(f"{PROG}: warning: others can reach it and no password is asked for; see --auth", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded(PROG, lambda: run(args))
