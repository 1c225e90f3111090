"""Files: what is in them, and how one is written as a whole.

gguf_header    the header of a GGUF: keys, and where its tensors are
base_model     what a converter needs of a base model; model_numbers: numbers in it that llama.cpp would not survive
checkpoint     a PyTorch checkpoint of an adapter
packed         base and adapter in one file
memory_file    the memory of a conversation; memory_numbers: its norms and singular values
description    what a file holds, for `deltamem inspect`
kinds          which files are of which kind: one is only replaced by another of its kind
outputs        files that commands write, checked before the work
atomic         a file that is replaced at once; ending: what SIGTERM leaves of one; disk_errors: why there is none
lock           locks of files and folders; memory_lock: those of memory files
sha256         the checksum of a file
pointer        pointers of Git LFS, in place of files
"""
