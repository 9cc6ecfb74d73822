"""Two agents on the OpenAI Agents SDK that share one conversation, in a file."""

import asyncio
import tempfile
from pathlib import Path

from agents import Agent, Runner, set_tracing_disabled
from agents.testing import ScriptedModel
from openai.types.responses import ResponseOutputMessage, ResponseOutputText

from crdtstate.integrations.openai_session import CrdtSession


def model_that_says(text: str) -> ScriptedModel:
    """In the place of a real model: nothing here needs the network."""
    content = ResponseOutputText(text=text, type="output_text", annotations=[])
    message = ResponseOutputMessage(
        id="1", type="message", role="assistant", content=[content], status="completed"
    )
    model = ScriptedModel()
    model.enqueue([message])
    return model


async def main() -> None:
    set_tracing_disabled(True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "team.db"
        # As a rule each is in a process, or on a host, of its own.
        ann = CrdtSession.open(file, "trip-7", name="ann")
        bob = CrdtSession.open(file, "trip-7", name="bob")
        async with ann as ann_session, bob as bob_session:
            guide = Agent("guide", model=model_that_says("The Golden Gate Bridge."))
            await Runner.run(guide, "What to see in San Francisco?", session=ann_session)

            booker = Agent("booker", model=model_that_says("Done."))
            await Runner.run(booker, "Book a tour of it.", session=bob_session)

        async with CrdtSession.open(file, "trip-7", name="eve") as session:
            for item in await session.get_items():
                content = item["content"]
                text = content if isinstance(content, str) else content[0]["text"]
                print(f"{item['role']}: {text}")


asyncio.run(main())
