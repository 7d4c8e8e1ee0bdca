"""The commands `medhead chat` (also `python -m medhead_app`) and `medhead serve`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import closing
from importlib.util import find_spec

from medhead.cli.common import Parser, add_model_options, check_range, check_tree_option, run_command
from medhead.errors import MedheadError
from medhead_app.api.tools.parsers import PARSERS

LOCAL = ("127.0.0.1", "localhost", "::1")
CHAT = "Serve a chat page that shows speculative decoding at work, and an OpenAI-compatible API beside it."
SERVE = "Serve an OpenAI-compatible API."
CHAT_EXAMPLES = """\
examples:
  medhead chat                                           the demo model; open the address that is printed
  medhead chat --model Qwen/Qwen3-0.6B --proposer recycling --port 8000
  medhead chat --host 0.0.0.0 --auth me:secret           for other machines in the network
"""
SERVE_EXAMPLES = """\
examples:
  medhead serve                                          the demo model at http://127.0.0.1:7860/v1
  medhead serve --model my/model --heads my/heads --port 8000
  medhead serve --host 0.0.0.0 --auth me:secret          for other machines; the API key is `secret`
"""
EPILOG = """
The server listens on this machine only, unless --host names another address. Stop it with Ctrl-C.
exit codes: 0 done, 2 wrong input, 1 failure, 130 stopped with Ctrl-C
"""


def build_parser(page: bool) -> Parser:
    """Return the parser of `medhead chat` (`page=True`) or `medhead serve`."""
    prog, what, examples = ("medhead chat", CHAT, CHAT_EXAMPLES) if page else ("medhead serve", SERVE, SERVE_EXAMPLES)
    parser = Parser(prog=prog, description=what, epilog=examples + EPILOG)
    parser.set_defaults(prog=prog)
    model = parser.add_argument_group("model and proposer")
    add_model_options(model)
    model.add_argument("--name", help="name of the model on the page and in the API (default: from --model)")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    server.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default: 7860)")
    server.add_argument("--auth", metavar="USER:PASSWORD", help="require this user; the password is also the API key")
    if page:
        server.add_argument("--share", action="store_true", help="make the page public through Gradio's servers")
        server.add_argument("--no-page", action="store_true", help="serve only the API, as `medhead serve` does")
    else:
        parser.set_defaults(share=False, no_page=True)
    formats = "how the model writes tool calls (default: as its chat template does)"
    server.add_argument("--tool-parser", choices=PARSERS, help=formats)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-rows", type=int, default=8, help="largest number of requests in a batch (default: 8)")
    limits.add_argument("--max-queue", type=int, default=64, help="largest number of waiting requests (default: 64)")
    limits.add_argument(
        "--prefix-cache-gib",
        type=float,
        help="memory in GiB for the key/value rows of earlier requests, which prompts that begin like them do not read again; "
        "0 keeps none (default: a tenth of the free memory)",
    )
    limits.add_argument(
        "--prefill-chunk",
        type=int,
        default=256,
        help="most prompt tokens that are read between two steps of other requests (default: 256)",
    )
    limits.add_argument("--time-limit", type=float, default=300.0, help="seconds a request may take (default: 300)")
    limits.add_argument("--max-prompt-tokens", type=int, help="longest prompt in tokens (default: the model's context)")
    limits.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)")
    return parser


def read_auth(value: str | None) -> tuple[str, str] | None:
    """Split the value of `--auth` into user and password."""
    if value is None:
        return None
    user, _, password = value.partition(":")
    if not user or not password:
        raise MedheadError("--auth must be USER:PASSWORD, both with at least one character")
    return user, password


def run(args: argparse.Namespace) -> None:
    """Load the model and serve it until Ctrl-C."""
    check_tree_option(args)
    check_range(args, "max_rows", 1, 4096, "from 1 to 4096")
    check_range(args, "max_queue", 0, 10**6)
    check_range(args, "prefix_cache_gib", 0, 2**20, "from 0 to 1048576")
    check_range(args, "prefill_chunk", 1)
    check_range(args, "time_limit", sys.float_info.min, sys.float_info.max, "above 0")
    check_range(args, "max_prompt_tokens", 1)
    check_range(args, "max_new_tokens", 1)
    check_range(args, "port", 0, 65535, "from 0 to 65535")
    if args.share and args.no_page:
        raise MedheadError("--share makes the page public; leave out --no-page")
    auth = read_auth(args.auth)
    if not args.no_page and find_spec("gradio") is None:
        raise MedheadError("gradio is not installed: pip install 'medhead[app]' (or serve only the API with --no-page)")
    from medhead_app.listen import Server, bind, url_of
    from medhead_app.middleware import LOCAL_HOSTS
    from medhead_app.server import build_app
    from medhead_app.startup import load_service

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("medhead_app.access").setLevel(logging.INFO)
    with closing(bind(args.host, args.port)) as bound, closing(load_service(args, args.prog)) as service:
        page = options = None
        if not args.no_page:
            from medhead_app.chat.build import build_page
            from medhead_app.chat.theme import page_options

            page, options = build_page(service), page_options()
        hosts = LOCAL_HOSTS if args.host in LOCAL and not args.share else None
        server = Server(build_app(service, page, options, auth=auth, hosts=hosts), service)
        url = url_of(bound, args.host if args.host in LOCAL else None)
        _print_urls(args, url, _share(bound.getsockname()[1]) if args.share else None)
        server.run(sockets=[bound])


def _share(port: int) -> str:
    import secrets

    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise MedheadError(f"--share could not get a public address: {reason}; it needs network access") from None


def _print_urls(args: argparse.Namespace, url: str, public_url: str | None) -> None:
    lines = [] if args.no_page else [f"open {url}"]
    lines.append(f"API at {url}/v1, metrics at {url}/metrics; stop with Ctrl-C")
    if public_url is not None:
        lines.append(f"public address: {public_url}")
    if args.auth is None and (public_url is not None or args.host not in LOCAL):
        lines.append("warning: others can reach this server without a password; set one with --auth")
    for line in lines:
        print(f"{args.prog}: {line}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run `medhead chat`; return the exit code."""
    return run_command(build_parser(page=True), run, argv)


def serve(argv: list[str] | None = None) -> int:
    """Run `medhead serve`, the API without the page; return the exit code."""
    return run_command(build_parser(page=False), run, argv)
