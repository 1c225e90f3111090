// Rows of logits, for the C API.
#pragma once

#include <cstddef>

// Whether a row of logits, [n], can be sampled from: it has a value other than 0 and -inf, and no NaN or +inf. A NaN in the
// model makes every logit NaN; a value beyond float32 becomes 0 in a norm.
bool llama_deltamem_is_usable(const float * logits, size_t n);
