"""The server: OpenAI's API with a memory a session, and the same for asyncio programs.

    worker         the thread that decodes for all requests; outbox: what it has for event loops
    history        which of a request's messages the memory has read already
    records        what is kept of a session
    store          sessions in a database; database: how it is opened; tables: its tables and statements
    session        a session in use: its text on the engine
    holds          one turn of a session at a time: locks and leases
    options        options of an answer; tools: functions that it may call
    prompts        messages to tokens, as the model's template has them
    shared         what turns share: model, store, sessions ready in memory
    answer         a turn, from its prompt to its commit
    service        `AsyncDeltaMem`: all of it for asyncio programs
    openai         requests and answers as OpenAI's API words them; responses: those of /v1/responses
    embeddings     vectors of texts
    lengths        how many tokens a text has at least
    state          a running server: settings, model, keys, health; keys: who asks
    application    the application and its endpoints
    memories       the endpoints of sessions; llama_server: those that llama-server has besides
    bodies         what a request says
    answers        how an answer is sent: whole, or as a stream
    guards         what every request passes: log, origin, size
    refusals       errors as OpenAI's API words them
    draining       how the application listens and ends
    supervisor     keeps a server alive whose layers are on other machines
    metrics, logs  what is watched
    page           the page at /; page_view: what a tab of a browser sees
    page_talk      messages that a session shows; page_said: how they are drawn; page_markdown: how an answer is
    page_memory    the memory as heat maps; page_maps: how they are drawn
    page_sessions  the list of sessions; page_parts: buttons and dialogs

Needs the extra `server`.
"""

from .service import AsyncDeltaMem

__all__ = ["AsyncDeltaMem"]
