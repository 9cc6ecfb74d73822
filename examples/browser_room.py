"""
A page in a browser and an agent that write one plan.

    python examples/browser_room.py           the page is played by a few lines of Python
    python examples/browser_room.py --stay    for a browser: open what it prints; Enter ends it
"""

import json
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from websockets.sync.client import connect

from crdtstate import blocking
from crdtstate.credentials import open_host_credentials
from crdtstate.relay.tokens import token_of


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def play(relay: str, token: str) -> None:
    """What crdtstate.js does, in short."""
    protocols = ["crdtstate", f"crdtstate.token.{token}"]
    with connect(f"{relay}/lanes/main", subprotocols=protocols) as page:
        page.send(json.dumps({"hello": {"session": "a-page-of-its-own", "name": "a page"}}))
        seen = json.loads(page.recv())
        print("the page reads:", seen["cells"])
        ops = [["put", "tasks", "write a test", "done"], ["count", "tokens", 10]]
        page.send(json.dumps({"write": 1, "seen": seen["welcome"]["number"], "ops": ops}))
        while "acked" not in (said := json.loads(page.recv())):
            pass
        print("acknowledged:", said["acked"])


def main(folder: Path, *, stay: bool) -> None:
    page = Path(__file__).with_suffix(".html")
    for source in (page, files("crdtstate.relay").joinpath("page", "crdtstate.js")):
        (folder / source.name).write_bytes(source.read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_port}"
    run = [sys.executable, "-m", "crdtstate", "relay", "--listen", "ws://127.0.0.1:0", "--attached"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*run, "--origin", origin], text=True, **pipes) as relay:
        url, token = relay.stdout.readline().split()[-1], token_of(open_host_credentials())
        with blocking.Replica("agent", peers=[url]) as agent:
            agent.map("tasks")["write a test"] = "open"
            agent.synced(timeout=10)
            if stay:
                print(f"{origin}/{page.name}#relay={url}&token={token}", flush=True)
                sys.stdin.readline()
            else:
                play(url, token)
            agent.synced(timeout=10)
            print("the agent reads:", dict(agent.map("tasks")), agent.counter("tokens").value)
        relay.stdin.close()
    server.server_close()


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        main(Path(name), stay="--stay" in sys.argv)
