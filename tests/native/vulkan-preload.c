// Preloaded by `make vulkan-check`, this stands between ggml-vulkan and the Vulkan loader. It does two things:
//
// It counts launches, of the graph that is recorded: ggml-vulkan records each graph anew and submits it once.
//
// It writes the bindings of a descriptor set that ggml-vulkan leaves as they were, because the next shader uses none of them.
// Vulkan allows that, but Mesa's software driver before version 25 looks at their buffers, which may be freed.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <string.h>
#include <vulkan/vulkan.h>

#define MAX_BINDINGS 32

static atomic_long n_launches;
static uint32_t    n_bindings; // of ggml-vulkan's one layout

static PFN_vkCmdDispatch               next_dispatch;
static PFN_vkCreateDescriptorSetLayout next_create_layout;
static PFN_vkGetDeviceProcAddr         next_device_proc;
static PFN_vkUpdateDescriptorSets      next_update;

__attribute__((visibility("default"))) long deltamem_vulkan_launches(void) {
    return atomic_load(&n_launches);
}

static VKAPI_ATTR void VKAPI_CALL dispatch(VkCommandBuffer buffer, uint32_t x, uint32_t y, uint32_t z) {
    atomic_fetch_add(&n_launches, 1);
    next_dispatch(buffer, x, y, z);
}

static VKAPI_ATTR VkResult VKAPI_CALL create_layout(VkDevice device, const VkDescriptorSetLayoutCreateInfo * info,
                                                    const VkAllocationCallbacks * callbacks,
                                                    VkDescriptorSetLayout *       layout) {
    n_bindings = info->bindingCount <= MAX_BINDINGS ? info->bindingCount : 0;
    return next_create_layout(device, info, callbacks, layout);
}

static VKAPI_ATTR void VKAPI_CALL update(VkDevice device, uint32_t n_writes, const VkWriteDescriptorSet * writes,
                                         uint32_t n_copies, const VkCopyDescriptorSet * copies) {
    next_update(device, n_writes, writes, n_copies, copies);
    for (uint32_t i = 0; i < n_writes; ++i) {
        VkWriteDescriptorSet rest = writes[i];
        const uint32_t       used = rest.dstBinding + rest.descriptorCount;
        if (rest.descriptorType != VK_DESCRIPTOR_TYPE_STORAGE_BUFFER || used >= n_bindings) {
            continue;
        }
        VkDescriptorBufferInfo infos[MAX_BINDINGS];
        for (uint32_t k = used; k < n_bindings; ++k) {
            infos[k - used] = writes[i].pBufferInfo[0];
        }
        rest.dstBinding      = used;
        rest.descriptorCount = n_bindings - used;
        rest.pBufferInfo     = infos;
        next_update(device, 1, &rest, 0, NULL);
    }
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL device_proc(VkDevice device, const char * name);

// what ggml-vulkan gets instead of a function of the driver
static PFN_vkVoidFunction ours(const char * name, PFN_vkVoidFunction found) {
    const struct {
        const char *         name;
        PFN_vkVoidFunction * next;
        PFN_vkVoidFunction   function;
    } all[] = {
        { "vkCmdDispatch", (PFN_vkVoidFunction *) &next_dispatch, (PFN_vkVoidFunction) dispatch },
        { "vkCreateDescriptorSetLayout", (PFN_vkVoidFunction *) &next_create_layout,
          (PFN_vkVoidFunction) create_layout },
        { "vkGetDeviceProcAddr", (PFN_vkVoidFunction *) &next_device_proc, (PFN_vkVoidFunction) device_proc },
        { "vkUpdateDescriptorSets", (PFN_vkVoidFunction *) &next_update, (PFN_vkVoidFunction) update },
    };
    for (size_t i = 0; found && i < sizeof(all) / sizeof(all[0]); ++i) {
        if (strcmp(name, all[i].name) == 0) {
            *all[i].next = found;
            return all[i].function;
        }
    }
    return found;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL device_proc(VkDevice device, const char * name) {
    return ours(name, next_device_proc(device, name));
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char * name) {
    // Python loads ggml-vulkan, and with it the loader, where RTLD_NEXT does not look
    void *                          loader = dlopen("libvulkan.so.1", RTLD_NOW);
    const PFN_vkGetInstanceProcAddr next =
            loader ? (PFN_vkGetInstanceProcAddr) dlsym(loader, "vkGetInstanceProcAddr") : NULL;
    return next ? ours(name, next(instance, name)) : NULL;
}
