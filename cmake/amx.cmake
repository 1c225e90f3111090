# ggml's AMX code, compiled so that it works: deltamem_mend_amx(TARGET) puts amx-tile-config.h before it, which mends a bug of
# GCC's and one of ggml's. Then runs AMX instructions as ggml does, and sets DELTAMEM_AMX_FLAGS to disable AMX if they fail:
# some virtual machines report AMX but do not execute it, and an illegal instruction would end the first prompt of a quantised
# model. Only -march=native builds are tested: they run on this machine.
set(DELTAMEM_AMX_HEADER ${CMAKE_CURRENT_LIST_DIR}/amx-tile-config.h)

function(deltamem_mend_amx target)
    if (CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        get_target_property(dir ${target} SOURCE_DIR)
        set_source_files_properties(${dir}/ggml-cpu/amx/mmq.cpp TARGET_DIRECTORY ${target}
            PROPERTIES COMPILE_OPTIONS "-include;${DELTAMEM_AMX_HEADER}" OBJECT_DEPENDS ${DELTAMEM_AMX_HEADER})
    endif()
endfunction()

if ((DEFINED GGML_NATIVE AND NOT GGML_NATIVE) OR CMAKE_CROSSCOMPILING OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR
        NOT CMAKE_C_COMPILER_ID MATCHES "GNU|Clang" OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    return()
endif()

include(CheckCXXSourceRuns)

set(DELTAMEM_AMX_PROGRAM [[
#ifdef __AMX_TILE__
#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

struct tile_config { uint8_t palette_id, start_row, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; };

static void load(const tile_config & tc) {
    _tile_loadconfig(&tc);
}

int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) {
        return 0; // ggml asks for this permission too, and then uses no AMX
    }
    alignas(64) tile_config tc = {};
    tc.palette_id = 1;
    tc.rows[4]    = 16;
    tc.colsb[4]   = 64;
    load(tc);
    _tile_zero(4);
    _tile_release();
}
#else
int main() {}
#endif
]])
set(CMAKE_REQUIRED_FLAGS "-march=native -O3")
# included by the source: a path with a space does not survive in the flags
check_cxx_source_runs("#include \"${DELTAMEM_AMX_HEADER}\"\n${DELTAMEM_AMX_PROGRAM}" DELTAMEM_AMX_WORKS)
unset(CMAKE_REQUIRED_FLAGS)

if (NOT DELTAMEM_AMX_WORKS)
    message(STATUS "AMX is left out: this machine does not run AMX code of this compiler")
    set(DELTAMEM_AMX_FLAGS -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
