// Error reporting for the C API, the hooks and native/deltamem_architectures.
#pragma once

#include <string>

// Logs the sentence and stores it for llama_deltamem_last_error().
void llama_deltamem_set_error(const std::string & what);
