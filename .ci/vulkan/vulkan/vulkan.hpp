// For Vulkan headers before 1.3.268 (Debian 12, Ubuntu 22.04): the three types of VK_EXT_layer_settings that llama.cpp names.
// It uses them only to ask for validation; a loader that does not know the structure passes over it.
#pragma once
#include_next <vulkan/vulkan.hpp>

#ifndef VK_EXT_layer_settings
namespace VULKAN_HPP_NAMESPACE {

enum class LayerSettingTypeEXT { eBool32, eInt32, eInt64, eUint32, eUint64, eFloat32, eFloat64, eString };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

struct LayerSettingsCreateInfoEXT {
    template <typename Settings>
    LayerSettingsCreateInfoEXT(const Settings & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}

    VkStructureType sType = static_cast<VkStructureType>(1000496000);
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;
};

}
#endif
