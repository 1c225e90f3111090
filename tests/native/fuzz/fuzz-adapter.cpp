// libFuzzer: adapter files of any content are loaded for tiny models, or refused with a reason. Begins with adapters that
// are whole, so no corpus is needed, and mutates what stands before their weights most.

#include "deltamem-adapter.h"
#include "deltamem-architectures.h"
#include "llama-deltamem.h"
#include "llama.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

static const char * const       architectures[] = { "qwen3", "falcon" }; // the second has q, k and v in one weight
static const llama_model *      models[2];
static std::vector<std::string> whole; // adapters
static int                      file;
static std::string              path;

[[noreturn]] static void fail(const char * what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    file = memfd_create("adapter", 0);
    path = "/proc/self/fd/" + std::to_string(file);
    if (file < 0) {
        fail("there is no file in memory");
    }
    for (int i = 0; i < 2; ++i) {
        models[i] = deltamem_tiny_model(architectures[i]);
        if (!models[i]) {
            fail(llama_deltamem_last_error());
        }
        for (const char * heads : { "q", "qkvo" }) {
            if (deltamem_tiny_adapter(models[i], 0, heads, path.c_str()) != 0) {
                fail(llama_deltamem_last_error());
            }
            std::ifstream in(path, std::ios::binary);
            whole.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
            llama_deltamem_weights(*models[i], path, false); // or this would find nothing
        }
    }
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    const std::string & origin = whole[seed % whole.size()];
    if (size < 16 && origin.size() <= max_size) {
        std::copy(origin.begin(), origin.end(), data);
        size = origin.size();
    }
    // the keys, the list of tensors, anything
    const size_t parts[] = { 1100, 1800, size, size };
    const size_t n       = std::min(size, parts[seed / 16 % 4]);
    const size_t rest    = size - n;

    std::vector<uint8_t> behind(data + n, data + size);
    const size_t         n_mutated = LLVMFuzzerMutate(data, n, max_size - rest);
    std::copy(behind.begin(), behind.end(), data + n_mutated);
    return n_mutated + rest;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t) size) {
        fail("the file in memory cannot be written");
    }
    for (const llama_model * model : models) {
        try {
            const llama_deltamem_weights weights(*model, path, size % 2 == 1);
            if (weights.layers.empty() || weights.n_bytes() == 0) {
                fail("an adapter without weights was loaded");
            }
        } catch (const std::exception & error) {
            if (!*error.what()) {
                fail("an adapter was refused without a reason");
            }
        }
    }
    return 0;
}
