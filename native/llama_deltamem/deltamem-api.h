// Error reporting shared by the C API and the hooks.
#pragma once

#include <string>

// Logs the sentence and keeps it for llama_deltamem_last_error().
void llama_deltamem_set_error(const std::string & what);
