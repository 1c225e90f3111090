// The device of metal-device.h. CMakeLists.txt has its rules copied from the pinned source (metal_rules.py).

#include "metal-device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-device.h"
#include "ggml-metal-impl.h"

// of ggml-metal's own, what the rules look at
struct ggml_metal_device {
    ggml_metal_device_props props;
};

#include "metal-rules.inc"

static ggml_metal_device properties(bool has_simdgroup_reduction) {
    ggml_metal_device device                = {};
    device.props.has_simdgroup_reduction    = has_simdgroup_reduction;
    device.props.has_simdgroup_mm           = has_simdgroup_reduction;
    device.props.has_bfloat                 = has_simdgroup_reduction;
    device.props.max_theadgroup_memory_size = 32768;
    return device;
}

ggml_backend_dev_t metal_device(bool has_simdgroup_reduction) {
    static ggml_metal_device   metal[2] = { properties(false), properties(true) };
    static ggml_backend_device devices[2];

    ggml_backend_device & device = devices[has_simdgroup_reduction];
    device.context               = &metal[has_simdgroup_reduction];
    device.iface.get_name        = [](ggml_backend_dev_t) { return "Metal"; };
    device.iface.get_description = device.iface.get_name;
    device.iface.get_type        = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.supports_op     = [](ggml_backend_dev_t dev, const ggml_tensor * op) {
        return ggml_metal_device_supports_op((ggml_metal_device_t) dev->context, op);
    };
    return &device;
}
