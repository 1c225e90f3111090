# If the CUDA toolkit has no cuBLAS, uses the one that pip installs (pip install nvidia-cublas nvidia-cuda-cccl).

set(DELTAMEM_CUBLAS_INCLUDE "" CACHE PATH "deltamem: headers of a cuBLAS outside of the CUDA toolkit")

find_package(CUDAToolkit QUIET)

if (NOT DELTAMEM_CUBLAS_INCLUDE AND NOT TARGET CUDA::cublas)
    # searches pip's build environment, then the environment that pip installs into
    execute_process(
        COMMAND ${Python_EXECUTABLE} -c "
import glob, sys, sysconfig
folders = [*sys.path, *(sysconfig.get_path(name) for name in ('purelib', 'platlib'))]
print(next((h for f in folders for h in glob.glob(f + '/nvidia/**/cublas_v2.h', recursive=True)), ''))"
        OUTPUT_VARIABLE header
        OUTPUT_STRIP_TRAILING_WHITESPACE)
    if (NOT header)
        message(FATAL_ERROR "The CUDA toolkit has no cuBLAS: pip install nvidia-cublas nvidia-cuda-cccl, and build again.")
    endif()
    get_filename_component(include ${header} DIRECTORY)
    get_filename_component(root ${include} DIRECTORY)
    set(DELTAMEM_CUBLAS_INCLUDE ${include} CACHE PATH "" FORCE)
    foreach (name cublas cublasLt)
        file(GLOB library ${root}/lib/lib${name}.so* ${root}/lib/x64/${name}.lib)
        list(GET library 0 library)
        set(CUDA_${name}_LIBRARY ${library} CACHE FILEPATH "" FORCE)
    endforeach()
endif()

if (DELTAMEM_CUBLAS_INCLUDE)
    message(STATUS "cuBLAS: ${CUDA_cublas_LIBRARY}")
    # CMake leaves folders inside the source tree out of the rpath, and .venv is one
    get_filename_component(library_dir ${CUDA_cublas_LIBRARY} DIRECTORY)
    list(APPEND CMAKE_INSTALL_RPATH ${library_dir})
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -isystem \"${DELTAMEM_CUBLAS_INCLUDE}\"")
    set(CMAKE_CXX_FLAGS  "${CMAKE_CXX_FLAGS} -isystem \"${DELTAMEM_CUBLAS_INCLUDE}\"")
endif()
