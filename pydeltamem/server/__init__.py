"""The server: OpenAI's API with a memory a session, and the same for asyncio programs.

    worker         the thread that decodes for all requests
    history        which of a request's messages the memory has read already
    records        what is kept of a session
    store          sessions in a database: database (how it is opened), tables
    session        a session in use: its text on the engine
    holds          one turn of a session at a time: locks and leases
    options        options of an answer
    prompts        messages to tokens, as the model's template has them
    shared         what turns share: model, store, sessions ready in memory
    answer         a turn, from its prompt to its commit; its news for event loops go through outbox
    service        `AsyncDeltaMem`: all of it for asyncio programs
    openai         requests and answers as OpenAI's API words them
    responses      those of /v1/responses
    lengths        how many tokens a text has at least
    state          a running server: settings, model, keys, health
    application    the application and its endpoints; beside it memories (those of sessions), llama_server (those that
                   llama-server has besides)
    bodies         what a request says
    answers        how an answer is sent: whole, or as a stream
    guards         what every request passes: log, origin, size
    refusals       errors as OpenAI's API words them
    metrics, logs  what is watched
    page           the page at /

Needs the extra `server`.
"""

from .service import AsyncDeltaMem

__all__ = ["AsyncDeltaMem"]
