# ggml-vulkan with the Vulkan headers of distributions that are older than it expects. Included where GGML_VULKAN is on.

if (CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(ggml-vulkan PRIVATE
        $<$<COMPILE_LANGUAGE:CXX>:-include ${CMAKE_CURRENT_SOURCE_DIR}/cmake/vulkan-layer-settings.h>)
endif()
