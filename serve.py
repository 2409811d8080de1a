"""Serve models with OpenAI's API, and a web page to chat with them.

python serve.py                                   every model under out/, the newest first
python serve.py out/sft out/lora --open           these two, and open the page in the browser
python serve.py --tools calculator                tools that the server calls during generation
python serve.py --host 0.0.0.0 --api_key KEY      reachable from the network; or set JIEZI_API_KEY
"""

import argparse
import contextlib
import os
import socket
import sys
import threading
import webbrowser
from dataclasses import fields
from pathlib import Path

from base.cli import HelpFormatter, UserError, above_zero, import_extra, natural, positive, run
from corpus.hub import model_folder
from engine.decoding import FORMATS
from engine.tools import load_tools
from model.device import choose_device, keep_freed_memory, print_notes

GRACE = 5  # seconds for answers to end when the server is stopped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("models", type=Path, nargs="*", metavar="DIR", help="folders of models or adapters")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks")
    parser.add_argument("--port", type=natural, default=8000, help="0: any free port")
    parser.add_argument(
        "--allowed_origins", nargs="+", default=(), metavar="URL", help="other sites whose pages may call; *: all"
    )
    parser.add_argument(
        "--allowed_hosts", nargs="+", default=(), metavar="NAME", help="names of this server, such as a proxy's; *: any"
    )
    parser.add_argument("--api_key", help="required of every request; default: JIEZI_API_KEY, if set")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, or another that torch has")
    parser.add_argument("--weight_dtype", choices=[*FORMATS], default="float32", help="on a CPU, as in eval.py")
    parser.add_argument("--tools", nargs="+", default=[], metavar="NAME", help="calculator, or a Python file")
    parser.add_argument("--max_rows", type=positive, default=16, help="answers generated at a time, per model")
    parser.add_argument("--max_queue", type=natural, default=64, help="answers that wait, per model; more get 429")
    parser.add_argument("--max_new_tokens", type=positive, default=1024, help="limit for every request")
    parser.add_argument("--request_timeout", type=above_zero, default=600, help="seconds for a request")
    args = parser.parse_args()
    if args.api_key is None:  # not as a default: --help would show it
        args.api_key = os.environ.get("JIEZI_API_KEY")
    if args.api_key == "":
        raise UserError("the API key is empty and would admit everyone: check --api_key and JIEZI_API_KEY")
    for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        import_extra(name, "requirements/serve.txt")
    import uvicorn

    from server.api import create_app, is_local
    from server.guard import TimeoutProtocol
    from server.models import find_models
    from server.service import ServerConfig

    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    elif args.weight_dtype != "float32":
        raise UserError("--weight_dtype is for generation on a CPU: give --device cpu")
    models = find_models([model_folder(name) for name in args.models])
    for served in models.values():
        if args.tools and served.is_chat:
            served.tokenizer.check_tools(served.directory)
    config = ServerConfig(**{field.name: getattr(args, field.name) for field in fields(ServerConfig)})
    app = create_app(models, config, device, load_tools(args.tools))
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {args.host}:{args.port} ({error}): give another --host or --port") from None
    if not is_local(args.host) and not args.api_key:
        print("everyone who can reach this machine can use the models: give --api_key", file=sys.stderr)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(args.host, args.host)
    url = f"http://{host}:{listening.getsockname()[1]}"
    print(f"{url}  {', '.join(models)}", flush=True)
    print_notes()
    if args.open:
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    options = dict(
        http=TimeoutProtocol, ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=GRACE
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after closing everything
        uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listening])


if __name__ == "__main__":
    run(main, less_memory="lower --max_rows, or serve fewer models")
