"""The server: OpenAI's API with a memory a session, and the same for asyncio programs.

    worker         the thread that decodes for all requests
    history        which of a request's messages the memory has read already
    records        what is kept of a session
    store          sessions in a database: database (how it is opened), tables
    session        a session in use: its text on the engine
    holds          one turn of a session at a time: locks and leases
    options        options of an answer
    service        `AsyncDeltaMem`: sessions, turns, commits
    openai         requests and answers as OpenAI's API words them
    responses      those of /v1/responses
    application    endpoints and answers
    guards         what every request passes: log, origin, size
    refusals       errors as OpenAI's API words them
    metrics, logs  what is watched
    page           the page at /

Needs the extra `server`.
"""

from .service import AsyncDeltaMem

__all__ = ["AsyncDeltaMem"]
