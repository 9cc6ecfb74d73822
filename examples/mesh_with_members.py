"""
A mesh with members: a queen who may do everything, a writer, and a reader.

Each has a join token, which says who it is and what it may do. What it writes is signed, and every
replica checks that by itself. On the command line tokens are made by `crdtstate invite`.
"""

import asyncio
import logging
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from crdtstate import NotAllowed, PeerDisconnected, Replica, WaitTimeout
from crdtstate.authority import Authority, create_root
from crdtstate.certificates import parse_grant

HOUR_MS = 3_600_000
logging.getLogger("crdtstate").setLevel(logging.ERROR)  # it logs whom it refuses


def invite(root: Authority, name: str, *roles: str) -> str:
    now_ms = int(time.time() * 1000)
    grants = [parse_grant(each) for each in roles]
    return root.invite(name, grants, now_ms, now_ms + HOUR_MS).encode()


async def main(folder: Path) -> None:
    root = create_root(folder / "mesh.root")  # kept off the machines of the mesh
    roles = {"queen": ("*:rws", "*:c"), "wanda": ("plan:rw", "notes:r"), "rob": ("*:r",)}
    async with AsyncExitStack() as stack:

        async def start(name: str, token: str, **options: object) -> Replica:
            replica = Replica(name, mesh=token, **options)
            return await stack.enter_async_context(replica)

        tokens = {name: invite(root, name, *roles[name]) for name in roles}
        queen = await start("queen", tokens["queen"], listen="ws://127.0.0.1:0")
        wanda = await start("wanda", tokens["wanda"], peers=[queen.address])
        rob = await start("rob", tokens["rob"], peers=[queen.address])
        plan = wanda.document("plan").map("plan")
        plan["goal"] = "ship it"
        await rob.wait_for(wanda.version(), timeout=10)
        print("rob reads:", dict(rob.document("plan").map("plan")))
        for who, document in ((wanda, "notes"), (rob, "plan")):
            try:
                who.document(document).map("plan")["goal"] = "mine"
            except NotAllowed as exc:
                print("no:", str(exc).partition(":")[0])

        stranger = await start("wanda", "words that somebody guessed", peers=[queen.address])
        try:
            await stranger.synced(timeout=1)
        except WaitTimeout:
            print("a stranger:", *stranger.unreachable().values())

        await queen.wait_for(wanda.version(), timeout=10)
        parted = queen.events(PeerDisconnected)
        queen.revoke("wanda", reason="her laptop was stolen")
        print("parted from:", (await anext(parted)).agent)
        plan["goal"] = "whoever has her laptop now"
        await rob.wait_for(queen.version(), timeout=10)
        print("rob still reads:", dict(rob.document("plan").map("plan")))
        print("revoked:", *(f"{each.agent}, as {each.reason}" for each in rob.revocations()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
