# Read by llama.cpp's own CMakeLists.txt when scripts/setup builds it (CMAKE_PROJECT_INCLUDE): what moend does not run
# often is compiled with less effort. ggml's kernels and the tokenizer are as fast as ever; the graphs of libllama's 150
# architectures, its samplers and its caches serve tests and `--llama-cache` only, and took as long as all of ggml.
if(NOT CMAKE_CURRENT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
  return()
endif()

function(moend_compile_with_less_effort)
  # Later options win; those of a file come after those of its library.
  target_compile_options(llama PRIVATE $<$<CONFIG:Release>:-O1>)
  set_source_files_properties(src/llama-vocab.cpp src/unicode.cpp TARGET_DIRECTORY llama
                              PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:-O3>)
  # The architectures, whose headers take longer than they do, in two files rather than ten.
  set_target_properties(llama PROPERTIES UNITY_BUILD_BATCH_SIZE 80)
  # Training, several devices at once, and reading files.
  set_source_files_properties(ggml/src/ggml-opt.cpp ggml/src/ggml-backend-meta.cpp ggml/src/gguf.cpp
                              TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:-O1>)
endfunction()
cmake_language(DEFER CALL moend_compile_with_less_effort)
