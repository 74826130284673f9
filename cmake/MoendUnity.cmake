# moend_unity(<target> <files>): compiles <files> source files of the target at once, in the order of their names. Most of
# the compiler's time goes into headers (nlohmann/json, fmt, CLI11, GoogleTest) and what each file instantiates of them;
# together, files pay for that once. So names are unique within a room, those of unnamed namespaces as well.
# -DMOEND_UNITY=OFF compiles every file by itself: faster when one file changes, and what clangd wants.
# (Precompiled headers were tried: they take 7 s and 150 MB each and save 1 to 2 s a file.)
function(moend_unity target files)
  if(MOEND_UNITY)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${files})
    # GCC 12 sees it in std::expected where there is none, depending on what else is inlined. The preset debug, which
    # compiles every file by itself, keeps the warning.
    target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  endif()
endfunction()
