# For unpatched builds of llama.cpp with its own CMake files (`-DCMAKE_PROJECT_INCLUDE=cmake/stock.cmake`): compiles
# AMX as our build does, or leaves it out where it does not run.

cmake_minimum_required(VERSION 3.19) # cmake_language

if (NOT PROJECT_NAME STREQUAL "ggml")
    return()
endif()

include(${CMAKE_CURRENT_LIST_DIR}/amx.cmake)

# at the end, when the targets are there: the option has to come after -march=native
function(deltamem_amx)
    if (TARGET ggml-cpu)
        target_compile_options(ggml-cpu PRIVATE ${DELTAMEM_AMX_FLAGS})
        deltamem_mend_amx(ggml-cpu)
    endif()
endfunction()

cmake_language(DEFER CALL deltamem_amx)
