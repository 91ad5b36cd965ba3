# Decides whether the CUDA kernels are built, and how. Included by CMakeLists.txt.

# Cubins run on later minors of their major: 80 serves 86 and 89, 100 serves 103, 120 serves 121.
# The last one gets PTX too, for GPUs younger than the compiler.
set(default_architectures 75 80 90 100 120)

# Sets reason to why nvcc cannot be used; leaves it empty, and CMAKE_CUDA_COMPILER set, where it can.
macro(fastlars_find_nvcc reason)
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(FASTLARS_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
    if(FASTLARS_NVCC)
      # Not CMAKE_CUDA_COMPILER: check_language would take it unchecked.
      set(ENV{CUDACXX} ${FASTLARS_NVCC})
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(${reason} "nvcc was not found in PATH, CUDACXX, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
  else()
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(${reason} "nvcc ($ENV{CUDACXX}) cannot compile a test program")
    endif()
  endif()
endmacro()

# Sets CMAKE_CUDA_ARCHITECTURES: FASTLARS_CUDA_ARCHS, or the default as far as this nvcc knows it.
macro(fastlars_choose_architectures)
  string(REGEX REPLACE "[ ,]+" ";" CMAKE_CUDA_ARCHITECTURES "${FASTLARS_CUDA_ARCHS}")
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
    foreach(arch ${default_architectures})
      if(known MATCHES "compute_${arch}[^0-9]")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
      endif()
    endforeach()
    string(REGEX REPLACE "-real$" "" CMAKE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  endif()
endmacro()

# Enables the language CUDA, or says why not. Sets FASTLARS_WITH_CUDA (0 or 1), FASTLARS_CUDA_REASON,
# FASTLARS_CUDA_VERSION and FASTLARS_CUDA_ARCH_LIST. A macro, because languages belong to the top level.
macro(fastlars_enable_cuda)
  foreach(setting FASTLARS_CUDA FASTLARS_CUDA_ARCHS)
    if(NOT DEFINED ${setting})
      set(${setting} "$ENV{${setting}}")
    endif()
  endforeach()
  if(NOT FASTLARS_CUDA MATCHES "^[01]?$")
    fastlars_stop("FASTLARS_CUDA must be 0, 1 or unset, got \"${FASTLARS_CUDA}\"")
  endif()

  set(FASTLARS_CUDA_REASON "")
  file(GLOB FASTLARS_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
  if(FASTLARS_CUDA STREQUAL "0")
    set(FASTLARS_CUDA_REASON "FASTLARS_CUDA=0 was set")
  elseif(NOT FASTLARS_CUDA_SOURCES)
    set(FASTLARS_CUDA_REASON "this version of fastlars has no CUDA kernels (no csrc/cuda/*.cu)")
  else()
    fastlars_find_nvcc(FASTLARS_CUDA_REASON)
  endif()

  if(NOT FASTLARS_CUDA_REASON)
    fastlars_choose_architectures()
    fastlars_if_it_stops("nvcc (${CMAKE_CUDA_COMPILER}) does not compile for ${CMAKE_CUDA_ARCHITECTURES}: \
set FASTLARS_CUDA_ARCHS to architectures that nvcc --list-gpu-arch names, or FASTLARS_CUDA=0")
    enable_language(CUDA)
    fastlars_if_it_stops("")
    set(FASTLARS_WITH_CUDA 1)
    set(FASTLARS_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
    string(REPLACE ";" " " FASTLARS_CUDA_ARCH_LIST "${CMAKE_CUDA_ARCHITECTURES}")
    message(STATUS "CUDA kernels: nvcc ${FASTLARS_CUDA_VERSION}, architectures ${FASTLARS_CUDA_ARCH_LIST}")
  elseif(FASTLARS_CUDA STREQUAL "1")
    fastlars_stop("FASTLARS_CUDA=1 demands CUDA kernels, but ${FASTLARS_CUDA_REASON}: \
install CUDA's nvcc, choose another with CUDACXX=/path/to/nvcc, or set FASTLARS_CUDA=0 to build none")
  else()
    set(FASTLARS_WITH_CUDA 0)
    message(STATUS "CUDA kernels: not built, because ${FASTLARS_CUDA_REASON}")
  endif()
endmacro()

# Adds the kernels to the extension.
function(fastlars_add_cuda target)
  target_sources(${target} PRIVATE ${FASTLARS_CUDA_SOURCES})
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
    CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  # -fmad=false, -ffp-contract=off: the same bits as the CPU back end. -t0: architectures in parallel.
  set(flags -fmad=false -Xcompiler=-ffp-contract=off -t0)
  check_compiler_flag(CUDA -compress-mode=size NVCC_HAS_COMPRESS_MODE)
  if(NVCC_HAS_COMPRESS_MODE)
    list(APPEND flags -compress-mode=size)
  endif()
  # Keeps kernels from being merged with those of other libraries; the default from CUDA 13 on.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8 AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13)
    list(APPEND flags -device-entity-has-hidden-visibility=true -static-global-template-stub=true)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
endfunction()
