// The C++ types of VK_EXT_layer_settings, which ggml-vulkan names in one place, for Vulkan headers older than 1.3.272
// (Debian 12 has 1.3.239). They have the layout of vulkan.hpp's. A loader that old does not offer the extension, and
// then every setting is off. cmake/vulkan.cmake includes this file before ggml-vulkan's own.
#pragma once

#include <vulkan/vulkan_core.h>

#include <cstdint>
#include <vector>

#ifndef VK_EXT_layer_settings

namespace vk {

enum class LayerSettingTypeEXT {
    eBool32 = 0
};

struct LayerSettingEXT {
    const char *        layer_name;
    const char *        setting_name;
    LayerSettingTypeEXT type;
    uint32_t            n_values;
    const void *        values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) :
        n_settings((uint32_t) settings.size()), settings(settings.data()) {}

    VkStructureType         type = (VkStructureType) 1000496000; // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void *            next = nullptr;
    uint32_t                n_settings;
    const LayerSettingEXT * settings;
};

} // namespace vk

#endif
