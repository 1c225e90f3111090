"""Endpoints that llama-server has besides OpenAI's."""

from __future__ import annotations

import asyncio
from typing import Any

import llama_cpp
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import InputError
from ..llama import DeltaMemLlama
from ..version import __version__
from .bodies import body_of
from .history import checked_messages
from .openai import Chat, field_of, flag
from .options import DEFAULTS
from .state import Server

_MAX_TOKENS = 1 << 17  # of a text, unless the context holds more


def describing(server: Server) -> APIRouter:
    """What llama-server says of itself, to programs that were made for it."""
    router = APIRouter()

    @router.get("/props")
    async def props(request: Request) -> Any:
        server.owner(request)
        llm, settings = server.service.llm, server.settings
        texts = {"bos_token": llm.token_bos(), "eos_token": llm.token_eos()}
        params = {"temperature" if name == "temp" else name: value for name, value in DEFAULTS.items()}
        return {
            "default_generation_settings": {"n_ctx": llm.n_ctx(), "params": params},
            "total_slots": server.service.worker.n_slots,
            "model_alias": settings.model,
            "model_path": settings.base,  # its name only
            "modalities": {"vision": False, "audio": False},
            "chat_template": llm.metadata.get("tokenizer.chat_template", ""),
            **{name: llm.detokenize([token], special=True).decode(errors="replace") for name, token in texts.items()},
            "build_info": f"pydeltamem {__version__}, llama-cpp-python {llama_cpp.__version__}",
            "is_sleeping": False,
        }

    @router.get("/slots")
    async def slots(request: Request) -> Response:
        server.owner(request)
        worker, n_ctx = server.service.worker, server.service.llm.n_ctx()
        n_used = worker.n_active
        if n_used >= worker.n_slots and request.query_params.get("fail_on_no_slot"):
            error = {"message": "no slot is free", "type": "unavailable_error", "code": "no_slot"}
            return JSONResponse({"error": error}, 503, {"Retry-After": "1"})
        return JSONResponse(
            [
                {"id": i, "n_ctx": n_ctx, "speculative": False, "is_processing": i < n_used}
                for i in range(worker.n_slots)
            ]
        )

    return router


def converting(server: Server) -> APIRouter:
    """Texts to tokens and back."""
    router = APIRouter()

    def most(llm: DeltaMemLlama) -> int:
        return max(_MAX_TOKENS, llm.n_ctx())

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        server.owner(request)
        body, llm = await body_of(request), server.service.llm
        text = field_of(body, "content", "")
        if not isinstance(text, str):
            raise InputError("content is a text")
        data, options = text.encode("utf-8", "surrogatepass"), {"add_bos": flag(body, "add_special")}
        options["special"] = flag(body, "parse_special", default=True)
        with_pieces = flag(body, "with_pieces")

        def answer() -> Response:
            n = server.service.lengths.at_least(data)
            if n > most(llm):
                raise InputError(f"content has at least {n} tokens: send parts of it")
            tokens: Any = llm.tokenize(data, **options)
            if with_pieces:
                tokens = [{"id": token, "piece": _piece(llm, token)} for token in tokens]
            return JSONResponse({"tokens": tokens})

        return await asyncio.to_thread(answer)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        server.owner(request)
        body, llm = await body_of(request), server.service.llm

        def answer() -> Response:
            tokens = llm._checked_tokens(field_of(body, "tokens", ()))
            if len(tokens) > most(llm):
                raise InputError(f"tokens has {len(tokens)} of them: send at most {most(llm)}")
            data = llm.detokenize(tokens.tolist(), special=True)
            return JSONResponse({"content": data.decode(errors="replace")})

        return await asyncio.to_thread(answer)

    @router.post("/apply-template")
    async def apply_template(request: Request) -> Any:
        server.owner(request)
        body, service = await body_of(request), server.service

        def prompt() -> str:
            asked = Chat(body, server.settings.model)
            return service.prompt_text(checked_messages(asked.messages), asked.options)

        return {"prompt": await asyncio.to_thread(prompt)}

    return router


def _piece(llm: Any, token: int) -> Any:
    data = llm.detokenize([token], special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
