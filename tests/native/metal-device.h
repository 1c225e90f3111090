// A Metal device's rules without a Mac: what the pinned ggml-metal says of a node, as a device that computes nothing.
#pragma once

#include "ggml-backend.h"

// With what every GPU has from Apple's A14 and M1 on, or without SIMD-group reductions. Never freed.
ggml_backend_dev_t metal_device(bool has_simdgroup_reduction);
