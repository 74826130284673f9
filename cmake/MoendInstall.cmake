# The CMake package `moend`: libraries, headers, the program, and what find_package(moend) needs to find the
# dependencies again. A ggml that scripts/setup built is installed along, in a folder of its own, so that it does not
# meet another one of the system.
include(CMakePackageConfigHelpers)

set(moend_package ${CMAKE_INSTALL_LIBDIR}/cmake/moend)
# The server is a program, not a library: who embeds moend needs none of its dependencies.
set(moend_exported ${MOEND_ROOMS})
list(REMOVE_ITEM moend_exported moend_serve)
foreach(room ${moend_exported})
  string(REPLACE moend_ "" short ${room})
  set_target_properties(${room} PROPERTIES EXPORT_NAME ${short})
endforeach()
add_library(moend_package INTERFACE)
target_link_libraries(moend_package INTERFACE ${moend_exported})
set_target_properties(moend_package PROPERTIES EXPORT_NAME moend)
install(TARGETS moend_package ${moend_exported} EXPORT moend_targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT moend_targets NAMESPACE moend:: FILE moendTargets.cmake DESTINATION ${moend_package})

# What a user of the library includes, and what those include; all other headers are the rooms' own. The test `install`
# compiles them, without {fmt} and JSON.
set(moend_public_headers
    attention/params base/error base/ledger calibrate/calibrate calibrate/default_text engine/benchmark engine/engine
    engine/generate engine/sampler engine/session_state eval/distance eval/interval eval/methods eval/metrics
    eval/perplexity eval/prompt eval/report eval/results eval/run eval/suite model/chat model/grammar model/layer_params
    model/model model/worker plan/describe plan/expert plan/layout plan/learned_scores plan/plan plan/query_stats
    solve/solve)
foreach(header ${moend_public_headers})
  get_filename_component(room ${header} DIRECTORY)
  install(FILES src/moend/${header}.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/moend/${room})
endforeach()

string(FIND "${ggml_DIR}" "${CMAKE_SOURCE_DIR}/.deps/" moend_own_ggml)
string(FIND "${llama_chat_DIR}" "${CMAKE_SOURCE_DIR}/.deps/" moend_own_jinja)
if(moend_own_ggml EQUAL 0 OR moend_own_jinja EQUAL 0)
  install(DIRECTORY .deps/install/ DESTINATION ${CMAKE_INSTALL_LIBDIR}/moend)
endif()

# Back ends for GPUs, which the program looks for beside itself (model/device.h).
install(DIRECTORY .deps/backends/ DESTINATION ${CMAKE_INSTALL_LIBDIR}/moend/backends OPTIONAL
        FILES_MATCHING PATTERN "libggml-*.so*")

configure_package_config_file(cmake/moendConfig.cmake.in ${CMAKE_BINARY_DIR}/moendConfig.cmake
                              INSTALL_DESTINATION ${moend_package})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/moendConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/moendConfig.cmake ${CMAKE_BINARY_DIR}/moendConfigVersion.cmake
        DESTINATION ${moend_package})
