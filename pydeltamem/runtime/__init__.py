"""What runs a model. `DeltaMemLlama` and `Conversation` stand on it.

library        the native library and its functions; loading: what is checked before a model is loaded
history        the rule of one write, without llama.cpp: where a text and its memory are
text           one text and its memory
slots          the sequences of a context, and llama_decode for several at once
engine         the one object that decodes: requests in common batches; request: one of them
generation     a request that goes on with the tokens that it samples
continuation   `DeltaMemLlama.generate`
completion     `DeltaMemLlama.create_completion`
embedding      `DeltaMemLlama.embed`
saved          what `DeltaMemLlama.save_state` keeps
model          what all these need of `DeltaMemLlama`
sampling       the token that follows; logprobs: how likely it was, beside others
grammar        what answers follow; json_grammar: the grammars of JSON schemas
tokenizer      bytes as tokens, and tokens as bytes; assembler: text out of tokens, as they come
chat_format    messages as the model's chat handler writes them
remote         layers on other machines
devices, cpus  GPUs and processors of this machine
unpacking      which weights prompts multiply in BF16
ggml           what ggml says of a file; quantize: a model in another type, by llama.cpp's own quantiser
architectures  which architectures take an adapter
lock           who may use a context, and a text; keeping: an error that another thread is to raise
interrupt      Ctrl-C between two steps
children       other processes of Python
values, names  checks of what callers give, and how errors call it
"""
