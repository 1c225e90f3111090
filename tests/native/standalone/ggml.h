// Stands in for ggml's header where the kernel is built alone: ggml-deltamem.h takes only this from it.
#pragma once

#include <stdint.h>

#define GGML_API extern
