# Kernels for NVIDIA GPUs, where a compiler for them is found. MOEND_CUDA: AUTO takes what is there, ON fails without,
# OFF does not look. A compiler from `scripts/setup --cuda` counts as found.
set(MOEND_CUDA AUTO CACHE STRING "Kernels for NVIDIA GPUs: AUTO, ON or OFF")
set_property(CACHE MOEND_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MOEND_HAVE_CUDA OFF)

if(NOT MOEND_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER AND EXISTS ${CMAKE_SOURCE_DIR}/.deps/cuda/nvcc-path)
    file(STRINGS ${CMAKE_SOURCE_DIR}/.deps/cuda/nvcc-path CMAKE_CUDA_COMPILER LIMIT_COUNT 1)
  endif()
  # Ampere and everything behind it; Hopper in its own code.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90-real)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    # CMake 3.25's own CUDAToolkit module stumbles over CUDA 13.
    get_filename_component(moend_cuda_home ${CMAKE_CUDA_COMPILER} REALPATH)
    get_filename_component(moend_cuda_home ${moend_cuda_home}/../.. ABSOLUTE)
    find_library(MOEND_CUDART cudart_static
                 HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${moend_cuda_home}
                 PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
      message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old; 12.4 or newer is needed")
    elseif(NOT MOEND_CUDART)
      message(STATUS "CUDA's compiler is there, its run-time library (cudart_static) is not")
    else()
      set(MOEND_HAVE_CUDA ON)
    endif()
  endif()
  if(MOEND_HAVE_CUDA)
    message(STATUS "kernels for NVIDIA GPUs: CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
    # moendConfig.cmake makes the same target, so that installed libraries do not name a path of this machine.
    add_library(moend::cudart INTERFACE IMPORTED GLOBAL)
    set_target_properties(moend::cudart PROPERTIES
      INTERFACE_LINK_LIBRARIES "${MOEND_CUDART};Threads::Threads;${CMAKE_DL_LIBS};rt")
  elseif(MOEND_CUDA STREQUAL "AUTO")
    message(STATUS "no kernels for NVIDIA GPUs (scripts/setup --cuda brings a compiler)")
  else()
    message(FATAL_ERROR "MOEND_CUDA is ON, but no CUDA 12.4 or newer was found")
  endif()
endif()

# moend_calls_cuda(<target>): its own C++ calls CUDA's run-time library.
function(moend_calls_cuda target)
  if(MOEND_HAVE_CUDA)
    target_compile_definitions(${target} PRIVATE MOEND_HAVE_CUDA)
    target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  endif()
endfunction()

# moend_cuda_kernels(<room>): the room's .cu files, as a part of its library. They are a library of objects by
# themselves, or whoever links the room would have to know CUDA as a language.
function(moend_cuda_kernels room)
  if(NOT MOEND_HAVE_CUDA)
    return()
  endif()
  file(GLOB_RECURSE kernels CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/moend/${room}/*.cu)
  add_library(moend_${room}_kernels OBJECT ${kernels})
  target_include_directories(moend_${room}_kernels PRIVATE ${CMAKE_SOURCE_DIR}/src)
  set_target_properties(moend_${room}_kernels PROPERTIES CUDA_STANDARD 17)  # the newest that CMake 3.25 has
  target_sources(moend_${room} PRIVATE $<TARGET_OBJECTS:moend_${room}_kernels>)
  target_link_libraries(moend_${room} PUBLIC moend::cudart)
  moend_calls_cuda(moend_${room})
endfunction()
