"""lm-evaluation-harness with our models: `python -m pydeltamem.evals.harness --model deltamem …`, else as lm-eval.

    python -m pydeltamem.evals.harness --model deltamem --model_args model=base.gguf,adapter=adapter.gguf --tasks piqa

Every request begins with an empty memory, which its tokens write as they are decoded, as published. Requests that begin
alike share what was decoded.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..llama import DeltaMemLlama
from ..runtime.generation import Generation
from ..runtime.history import n_common
from .items import digest
from .sampling import cooled_first

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as missing:
    raise InputError(f"the harness needs {missing.name}: pip install 'pydeltamem[lm-eval]'") from None


logger = logging.getLogger(__name__)

GOES_ON = "[here the message goes on] "  # stands for the rest of a message, and a template may take its last space
OF_THE_HARNESS = ("batch_size", "max_batch_size", "device", "trust_remote_code")


@register_model("deltamem")
class DeltaMemLM(TemplateLM):
    """A model for lm-evaluation-harness. Names are those of `--model_args`.

    Args:
        model: GGUF, or a name.
        adapter: GGUF, PyTorch directory or name; None: that of a packed model, else there is no memory.
        lora: LoRA adapter GGUF.
        n_ctx: tokens of a request at most. Logits of each are kept: n_ctx · vocabulary · 4 bytes.
        n_threads: for all decodes; None: as DeltaMemLlama.
        parallel: texts that are generated together.
        **kwargs: what lm-eval itself passes, which has no effect.

    Raises InputError if it is given another one.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        lora: str | None = None,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        parallel: int = 4,
        **kwargs: Any,
    ) -> None:
        unknown = [name for name in kwargs if name not in OF_THE_HARNESS]
        if unknown:
            known = "model, adapter, lora, n_ctx, n_threads, parallel"
            raise InputError(f"--model_args: there is no {unknown[0]}: {known}")
        super().__init__()
        self.llm = DeltaMemLlama(
            model, deltamem_path=adapter, lora_path=lora, n_ctx=int(n_ctx), n_threads=n_threads,
            n_threads_batch=n_threads, n_seq_max=int(parallel), logits_all=True,
        )  # fmt: skip
        if self.llm.memory.attached and self.llm.memory.by_segment:
            logger.warning("%s writes once a message: a request has none, so each token writes", adapter or model)
        self.parallel = int(parallel)
        self._known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}

    @property
    def max_length(self) -> int:
        return self.llm.n_ctx()

    @property
    def eot_token_id(self) -> int:
        return self.llm.token_eos()

    @property
    def prefix_token_id(self) -> int:
        bos = self.llm.token_bos()
        return bos if bos >= 0 else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, with the one that begins texts if the model has it. Names of control tokens count."""
        adds = add_special_tokens is not False and self.llm._model.add_bos_token()
        tokens = self.llm.tokenize(string.encode(), add_bos=False, special=True)
        return [self.llm.token_bos(), *tokens] if adds and tokens[:1] != [self.llm.token_bos()] else tokens

    #
    # probabilities
    #

    def _read(self, tokens: Sequence[int]) -> None:
        """Makes these tokens the text, and what they write the memory. `llm.scores` then has their logits."""
        llm = self.llm
        n = min(n_common(llm._text.tokens, tokens), len(tokens) - 1)
        if n <= 1 or n < llm._text.position.floor:
            llm.reset()
            if llm.memory.attached:
                llm.memory.reset()
            n = 0
        else:
            llm.n_tokens = n
        llm.eval(list(tokens[n:]))

    def _last(self, tokens: list[int], n: int) -> list[int]:
        """The last n tokens; says so if there are more."""
        if len(tokens) > n:
            logger.warning("n_ctx=%d: a request loses its first %d tokens", self.max_length, len(tokens) - n)
        return tokens[-n:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])  # alike side by side
        for i in tqdm(order, desc="loglikelihood", disable=disable_tqdm):
            texts, context, continuation = requests[i]
            context = context or [self.prefix_token_id]  # lm-eval counts the spaces at its end to what follows
            if len(continuation) > self.max_length:
                raise InputError(f"n_ctx={self.max_length}: a continuation has {len(continuation)} tokens: raise it")
            tokens = self._last(context + continuation, self.max_length + 1)
            if not continuation:
                continue
            self._read(tokens[:-1])
            rows = np.asarray(self.llm.scores[len(tokens) - 1 - len(continuation) : len(tokens) - 1], dtype=np.float64)
            highest = rows.max(axis=1)
            logs = highest + np.log(np.exp(rows - highest[:, None]).sum(axis=1))
            said = rows[np.arange(len(continuation)), continuation]
            found[i] = float((said - logs).sum()), bool((rows.argmax(axis=1) == continuation).all())
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text, in windows of the whole context. The memory begins with each window."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    #
    # generation
    #

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """In common batches, each in a text of its own with an empty memory."""
        found: list[str] = []
        engine = self.llm._engine
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for at in range(0, len(requests), self.parallel):
                some = requests[at : at + self.parallel]
                running = [self._generation(*request.args) for request in some]
                while left := [generation for generation in running if not generation.is_over]:
                    engine.wait(left)
                for request, generation in zip(some, running):
                    with engine.lock:
                        engine.slots.leave(generation.text)
                    if generation.error is not None:
                        raise generation.error
                    found.append(generation.content)
                    self.cache_hook.add_partial("generate_until", request.args, generation.content)
                    bar.update()
        return found

    def _generation(self, context: str, given: dict[str, Any]) -> Generation:
        """What follows a text, as a request of the engine."""
        llm, options = self.llm, normalize_gen_kwargs(dict(given), default_max_gen_toks=256)
        n_predict = options["max_gen_toks"]
        self._name_ignored(options)
        if n_predict >= self.max_length:
            raise InputError(f"n_ctx={self.max_length}: leaves no room for a prompt beside max_gen_toks={n_predict}")
        sampling = {name: options.get(name, off) for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))}
        temperature = options.get("temperature", 1.0 if options["do_sample"] else 0.0)
        seed = random.randrange(2**32 - 1)  # which lm-eval's --seed decides; samples of one request differ
        with llm._engine.lock:
            sampler = llm._seeded_sampler(seed, **cooled_first(temperature, **sampling))
        generation = Generation(llm._engine.text())
        stop = [text for text in options["until"] if text]
        generation.prepare(llm, sampler, n_predict=n_predict, stop=stop)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        generation.ask(self._last(prompt, self.max_length - n_predict))
        return generation

    def _name_ignored(self, options: Mapping[str, Any]) -> None:
        """Logs once each option of a task that has no effect."""
        for name in options.keys() - self._known:
            self._known.add(name)
            logger.warning("generation_kwargs: %s has no effect here", name)

    #
    # chat templates
    #

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval keeps the prompts of a task (`--cache_requests`). The same model is published
        with several chat templates.
        """
        return digest(f"{self.llm.fingerprint}\n{self.chat_template(True)}")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llm.metadata.get("tokenizer.chat_template") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of these messages by the model's template. Without a generation prompt the last message is not
        ended: lm-eval asks so where a task gives the beginning of the answer (`gen_prefix`).

        Raises InputError if the model has no template, or one that refuses the messages.
        """
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.chat_template(True)
        if template is None:
            raise InputError(f"{self.llm.model_path}: has no chat template: leave out --apply_chat_template")
        bos, eos = (
            self.llm.detokenize([token], special=True).decode() if token >= 0 else ""
            for token in (self.llm.token_bos(), self.llm.token_eos())
        )
        messages: Any = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += GOES_ON
        try:
            form = Jinja2ChatFormatter(template, eos, bos, add_generation_prompt=add_generation_prompt)
            prompt = str(form(messages=messages).prompt)
        except Exception as error:  # a template is a program
            raise InputError(f"{self.llm.model_path}: its chat template refuses this conversation: {error}") from error
        return prompt if add_generation_prompt else _before_mark(prompt, self.llm.model_path)


def _before_mark(prompt: str, path: str) -> str:
    """A prompt up to GOES_ON, as transformers cuts it: spaces that the template takes from a message's end go, too."""
    kept, mark, _ = prompt.rpartition(GOES_ON.strip())
    if not mark:
        raise InputError(f"{path}: its chat template leaves out the last message, which the model is to go on with")
    return kept if prompt.startswith(GOES_ON, len(kept)) else kept.rstrip()


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
